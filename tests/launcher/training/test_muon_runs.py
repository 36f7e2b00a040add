"""A run with Muon: stopped and resumed, moved to another layout, begun under another optimizer, counted in bytes."""

from pathlib import Path

import pytest
from rank_pool import run_mesh
from tiny_run import EP2, build, checkpoint_bytes, metrics, numbers, saved_state, start, start_on

from meshwright.launcher.runfile.footprint import state_bytes
from meshwright.launcher.runfile.messages import ConfigError
from meshwright.parallel.checkpoint.load import saved_tensors
from meshwright.parallel.mesh import Sizes

COMMON = ("learning_rate.schedule=constant", "evaluation.every=0", "checkpoint.every=0")
MUON = (*COMMON, "optimizer.kind=muon")
ALLOWED = ("optimizer.kind",)
MATRICES = {f"layers.0.mixer.part.{place}.weight" for place in ("q", "k", "v", "output")}


def saved_names(folder: Path, step: int) -> set[str]:
    return set(saved_tensors(folder / "run" / "checkpoints" / f"step_{step:08}"))


def events(folder: Path) -> list[str]:
    return [record["text"] for record in metrics(folder) if record["kind"] == "event"]


def test_a_resumed_run_is_bitwise_the_unbroken_one(tmp_path: Path) -> None:
    for name, stops in {"broken": (2, 4), "whole": (4,)}.items():
        (tmp_path / name).mkdir()
        for steps in stops:
            start(tmp_path / name, f"train.steps={steps}", *MUON)
    assert numbers(tmp_path / "broken", "loss") == numbers(tmp_path / "whole", "loss")
    assert checkpoint_bytes(tmp_path / "broken", 4) == checkpoint_bytes(tmp_path / "whole", 4)
    names = saved_names(tmp_path / "whole", 4)
    assert {name for name in MATRICES if f"optimizer.momentum.{name}" in names} == MATRICES
    assert {name for name in names if name.startswith("optimizer.exp_avg") and "q.weight" in name} == set()
    assert "optimizer.exp_avg.embedding.weight" in names


@pytest.mark.parametrize(
    ("sizes", "overrides"),
    [
        pytest.param(EP2, ["parallel.ep=2", "zero.stage=1"], marks=pytest.mark.slow),
        pytest.param(Sizes(dp_shard=2), ["zero.stage=3"], marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_on_another_layout(tmp_path: Path, sizes: Sizes, overrides: list[str]) -> None:
    fp64 = (*MUON, "train.precision=fp64")
    for name in ("moved", "whole"):
        (tmp_path / name).mkdir()
    start(tmp_path / "moved", "train.steps=2", *fp64)
    run_mesh(sizes, start_on, tmp_path / "moved", [*fp64, "train.steps=4", *overrides])
    start(tmp_path / "moved", "train.steps=5", *fp64)
    start(tmp_path / "whole", "train.steps=5", *fp64)
    for name in ("loss", "grad_norm"):  # fp64 sums in another order (promise 2)
        assert numbers(tmp_path / "moved", name) == pytest.approx(numbers(tmp_path / "whole", name), rel=1e-9)


def test_another_optimizer_is_taken_on_request_and_says_what_it_drops(tmp_path: Path) -> None:
    start(tmp_path, "train.steps=2", *COMMON)
    with pytest.raises(ConfigError, match=r'optimizer.kind = "muon": .*--allow-change optimizer.kind takes'):
        start(tmp_path, "train.steps=3", *MUON)
    start(tmp_path, "train.steps=3", *MUON, allow_change=ALLOWED)
    told = [text for text in events(tmp_path) if "takes over" in text]
    assert told[0].startswith("changed: Muon takes over layers.0.mixer.part.q.weight, ")
    assert told[0].endswith("more: the moments of AdamW are dropped, the average begins at zero")
    assert saved_state(tmp_path, 3)["updates"] == 3  # the others' moments went on
    start(tmp_path, "train.steps=4", *COMMON, allow_change=ALLOWED)
    assert any("the moments of all parameters of AdamW begin anew" in text for text in events(tmp_path))
    assert saved_state(tmp_path, 4)["updates"] == 1
    assert len([text for text in saved_state(tmp_path, 4)["changes"] if "takes over" in text]) == 2
    start(tmp_path, "train.steps=5", *COMMON)
    assert numbers(tmp_path, "step") == [1, 2, 3, 4, 5]


def test_moments_that_are_kept_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    start(tmp_path, "train.steps=2", *COMMON)
    (tmp_path / "branch").mkdir()
    source = f"init.from={tmp_path / 'run'}"
    run = start(tmp_path / "branch", "train.steps=1", *MUON, source, "init.load=weights+optimizer")
    assert saved_state(tmp_path / "branch", 1)["updates"] == 3
    assert any(text.startswith("Muon takes over") for text in events(tmp_path / "branch"))
    assert run.optimizer.moments("embedding.weight")["exp_avg"].abs().max() > 0


def test_a_run_holds_the_bytes_that_check_promises(tmp_path: Path) -> None:
    run = build(tmp_path, list(MUON))
    held = sum(one.nbytes for name in run.engine.parts for one in run.optimizer.moments(name).values())
    assert held == state_bytes(run.run_file, 1).moments
    assert held < state_bytes(build(tmp_path, list(COMMON)).run_file, 1).moments
