"""A run that was stopped goes on as if it had not been: bitwise on the same layout, equal on another."""

import json
from pathlib import Path

import pytest
from rank_pool import run_mesh
from tiny_run import EP2, build, checkpoint_bytes, metrics, numbers, saved_state, start, start_on

from meshwright.launcher.runfile.messages import ConfigError
from meshwright.parallel.checkpoint import durable
from meshwright.parallel.checkpoint.durable import write_file
from meshwright.parallel.checkpoint.folder import list_checkpoints
from meshwright.parallel.mesh import Sizes


def stop_and_go_on(folder: Path, *overrides: str) -> None:
    """Six steps, the last three by a second start."""
    start(folder, "train.steps=3", *overrides)
    start(folder, "train.steps=6", *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(("learning_rate.schedule=constant",), marks=pytest.mark.slow),
        pytest.param(("learning_rate.schedule=constant", "train.precision=bf16"), marks=pytest.mark.slow),
        ("learning_rate.schedule=constant", "checkpoint.asynchronous=true", "train.skip_norm_spike=1.0"),
    ],
)
def test_a_resumed_run_is_bitwise_the_unbroken_one(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "whole").mkdir()
    stop_and_go_on(tmp_path / "broken", *overrides)
    start(tmp_path / "whole", "train.steps=6", *overrides)
    for name in ("loss", "grad_norm", "learning_rate", "samples", "expert_entropy"):
        assert numbers(tmp_path / "broken", name) == numbers(tmp_path / "whole", name), name
    assert numbers(tmp_path / "broken", "validation_loss", "evaluation") == numbers(
        tmp_path / "whole", "validation_loss", "evaluation"
    )
    broken, whole = checkpoint_bytes(tmp_path / "broken", 6), checkpoint_bytes(tmp_path / "whole", 6)
    assert broken == whole
    changes = {"changes": ["step 3: train.steps: 3 -> 6"]}
    assert saved_state(tmp_path / "broken", 6) == saved_state(tmp_path / "whole", 6) | changes
    assert sum(map(len, whole.values())) > 10_000


@pytest.mark.parametrize(
    ("sizes", "overrides"),
    [
        pytest.param(EP2, ["parallel.ep=2"], marks=pytest.mark.slow),
        pytest.param(Sizes(dp_shard=2), ["zero.stage=3"], marks=pytest.mark.slow),
        (Sizes(tp=2, etp=2), ["parallel.tp=2", "parallel.etp=2", "zero.stage=1"]),
        pytest.param(
            Sizes(dp_shard=4, ep=2),
            ["parallel.ep=2", "zero.stage=1", "train.micro_batch_size=1"],
            marks=pytest.mark.slow,
        ),
        pytest.param(Sizes(cp=2), ["parallel.cp=2", "zero.stage=2"], marks=pytest.mark.slow),
        pytest.param(
            Sizes(dp_replicate=2, dp_shard=2, tp=2, ep=2),
            ["parallel.dp_replicate=2", "parallel.tp=2", "parallel.ep=2", "zero.stage=3"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_goes_on_on_another_layout(tmp_path: Path, sizes: Sizes, overrides: list[str]) -> None:
    # One key head on two ranks of tp is held twice, and 321 rows on two ranks have one of padding.
    (tmp_path / "moved").mkdir()
    (tmp_path / "whole").mkdir()
    common = ("learning_rate.schedule=constant", "train.precision=fp64", "model.vocab_size=321")
    start(tmp_path / "moved", "train.steps=3", *common)
    run_mesh(sizes, start_on, tmp_path / "moved", [*common, *overrides])
    start(tmp_path / "moved", "train.steps=8", *common)
    start(tmp_path / "whole", "train.steps=8", *common)
    # fp64 sums in another order (promise 2)
    for name in ("loss", "grad_norm"):
        assert numbers(tmp_path / "moved", name) == pytest.approx(numbers(tmp_path / "whole", name), rel=1e-9)
    assert numbers(tmp_path / "moved", "samples") == numbers(tmp_path / "whole", "samples")
    texts = [record["text"] for record in metrics(tmp_path / "moved") if record["kind"] == "event"]
    assert any(text.startswith("resumed at step 3 from") for text in texts)


def test_what_may_not_change_is_refused_and_what_was_allowed_is_recorded(tmp_path: Path) -> None:
    start(tmp_path, "train.steps=3")
    before = checkpoint_bytes(tmp_path, 3)
    with pytest.raises(ConfigError, match=r"learning_rate.peak = 0.5: .*--allow-change learning_rate.peak"):
        start(tmp_path, "learning_rate.peak=0.5")
    with pytest.raises(ConfigError, match=r"run.seed = 1: "):
        start(tmp_path, "run.seed=1")
    with pytest.raises(ConfigError, match=r"model.hidden_size = 32: the checkpoint has 16, .* may never change"):
        start(tmp_path, "model.hidden_size=32")
    assert checkpoint_bytes(tmp_path, 3) == before
    start(tmp_path, "learning_rate.peak=0.005", allow_change=("learning_rate.peak",))
    texts = [record["text"] for record in metrics(tmp_path) if record["kind"] == "event"]
    assert "changed: learning_rate.peak: 0.01 -> 0.005" in texts
    assert saved_state(tmp_path, 3)["changes"] == []
    start(tmp_path, "learning_rate.peak=0.005", "train.steps=7")
    # In the checkpoints as well, and for good.
    assert "step 3: learning_rate.peak: 0.01 -> 0.005" in saved_state(tmp_path, 7)["changes"]


def damage(folder: Path, step: int) -> None:
    """Flip a bit of a run's checkpoint."""
    path = folder / "run" / "checkpoints" / f"step_{step:08}" / "rank_00000.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_what_a_run_fell_back_to_stays_until_another_whole_checkpoint_takes_its_place(tmp_path: Path) -> None:
    constant = ("learning_rate.schedule=constant", "evaluation.every=0", "checkpoint.keep_last=2")
    start(tmp_path, "train.steps=5", *constant)  # every third step, and the last
    damage(tmp_path, 5)
    start(tmp_path, "train.steps=6", *constant)
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == [3, 5, 6]
    damage(tmp_path, 6)
    start(tmp_path, "train.steps=7", *constant)
    assert numbers(tmp_path, "step") == [1, 2, 3, 4, 5, 6, 7]
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == [5, 6, 7]  # 6 was written anew and counts


@pytest.mark.parametrize(
    ("kind", "told"), [("link", "is a link to .*gone, which is not there"), ("file", "is no folder")]
)
def test_a_place_of_checkpoints_that_is_none_does_not_begin_the_run_anew(tmp_path: Path, kind: str, told: str) -> None:
    start(tmp_path, "train.steps=1", "evaluation.every=0")
    folder = tmp_path / "run" / "checkpoints"
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "gone") if kind == "link" else folder.write_text("")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=told):
        start(tmp_path, "train.steps=2", "evaluation.every=0")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_steps_of_a_run_that_begins_anew_are_moved_aside(tmp_path: Path) -> None:
    start(tmp_path, "train.steps=2", "evaluation.every=0")
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "moved")
    start(tmp_path, "train.steps=1", "evaluation.every=0")
    assert numbers(tmp_path, "step") == [1]
    aside = (tmp_path / "run" / "metrics.dropped.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in aside] == [1, 2]


@pytest.mark.parametrize(("name", "value"), [("updates", None), ("step", "six"), ("run_file", "[[["), ("norms", {})])
def test_a_state_that_was_written_by_another_hand_is_refused(tmp_path: Path, name: str, value: object) -> None:
    """Sealed again, so that no hash tells."""
    start(tmp_path, "train.steps=1", "evaluation.every=0")
    path = tmp_path / "run" / "checkpoints" / "step_00000001"
    state = json.loads((path / "state.json").read_bytes()) | {name: value}
    for file in ("state.json", "manifest.json"):
        (path / file).rename(tmp_path / file)
    seal = write_file(path / "state.json", json.dumps(state).encode())
    manifest = json.loads((tmp_path / "manifest.json").read_bytes())["manifest"]
    manifest["files"]["state.json"] = seal.as_json()
    whole = {"manifest": manifest, durable.HASH_NAME: durable.hash_bytes(durable.as_json_bytes(manifest)).xxh3_128}
    write_file(path / "manifest.json", durable.as_json_bytes(whole))
    with pytest.raises(ConfigError, match=r"step_00000001: the (state|run file) in it"):
        start(tmp_path, "train.steps=2", "evaluation.every=0")


def test_a_damaged_checkpoint_is_passed_over_and_its_steps_are_made_again(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    start(tmp_path / "whole")
    start(tmp_path)
    damage(tmp_path, 6)
    start(tmp_path)
    assert numbers(tmp_path, "loss") == numbers(tmp_path / "whole", "loss")
    texts = [record["text"] for record in metrics(tmp_path) if record["kind"] == "event"]
    assert any("passed over" in text and "step_00000006" in text for text in texts)
    assert checkpoint_bytes(tmp_path, 6) == checkpoint_bytes(tmp_path / "whole", 6)


def test_a_store_with_other_tokens_is_refused(tmp_path: Path) -> None:
    start(tmp_path, "train.steps=3")
    run = build(tmp_path, [])
    run.store.meta = run.store.meta.model_copy(update={"vocab_size": run.store.meta.vocab_size - 1})
    from meshwright.launcher.training.saving import resume

    with pytest.raises(ConfigError, match="holds other tokens than those of the checkpoint"):
        resume(run)
