"""A run whose model is split into stages trains, evaluates, stops, saves and goes on like a run of one process."""

import os
import signal
from pathlib import Path

import pytest
import torch
from rank_pool import run_mesh
from tiny_run import build, checkpoint_bytes, numbers, start, start_on

from meshwright.launcher.runfile.messages import ConfigError
from meshwright.launcher.training import loop
from meshwright.launcher.training.stopping import NotANumberError
from meshwright.parallel.mesh import Mesh, Sizes
from meshwright.parallel.tally import Tally

TWO = Sizes(pp=2)
PIPELINE = ["parallel.pp=2", "learning_rate.schedule=constant"]
ZBV = [*PIPELINE, "pipeline.schedule=zbv", "model.num_layers=4"]


@pytest.mark.parametrize(
    ("sizes", "overrides"),
    [
        pytest.param(
            TWO, ["parallel.pp=2", "pipeline.schedule=zbv", "model.tie_embeddings=true"], marks=pytest.mark.slow
        ),
        pytest.param(TWO, ["parallel.pp=2", "model.tie_embeddings=true"], marks=pytest.mark.slow),
        pytest.param(
            Sizes(pp=2, dp_shard=2, ep=2),
            ["parallel.pp=2", "parallel.ep=2", "pipeline.schedule=interleaved_1f1b", "zero.stage=3"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Sizes(pp=2, dp_shard=2, ep=2),
            [
                "parallel.pp=2",
                "parallel.ep=2",
                "zero.stage=1",
                "model.tie_embeddings=true",
                "checkpoint.asynchronous=true",
            ],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_goes_into_stages_and_out_of_them_again(tmp_path: Path, sizes: Sizes, overrides: list[str]) -> None:
    moved, whole = tmp_path / "moved", tmp_path / "whole"
    moved.mkdir(), whole.mkdir()
    model = [text for text in overrides if text.startswith("model.")]
    common = ["learning_rate.schedule=constant", "train.precision=fp64", "model.num_layers=4", *model]
    common += ["train.micro_batch_size=1"]
    run_mesh(sizes, start_on, moved, [*common, *overrides, "train.steps=3"])
    start(moved, *common, "train.steps=6")
    run_mesh(sizes, start_on, moved, [*common, *overrides, "train.steps=8"])
    start(whole, *common, "train.steps=8")
    for name in ("loss", "grad_norm", "router_loss/load_balancing"):  # fp64 sums in another order (promise 2)
        assert numbers(moved, name) == pytest.approx(numbers(whole, name), rel=1e-9)
    assert numbers(moved, "samples") == numbers(whole, "samples")
    held_out = numbers(moved, "validation_loss", "evaluation")
    expected = numbers(whole, "validation_loss", "evaluation")
    assert held_out[:2] == pytest.approx(expected[:2], rel=1e-9)
    assert held_out[-1] == pytest.approx(expected[-1], rel=1e-9)


def test_what_layers_of_experts_that_choose_and_for_some_tokens_show_is_of_all_stages(tmp_path: Path) -> None:
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    cut.mkdir(), whole.mkdir()
    model = ["model.pattern=[*E]", "model.depth.capacity=0.5", "model.moe.router=expert_choice"]
    common = [*model, "model.moe.load_balancing=none", "model.moe.top_k=1", "model.num_layers=4", "train.steps=2"]
    run_mesh(TWO, start_on, cut, [*common, *PIPELINE, "train.precision=fp64"])
    start(whole, *common, "learning_rate.schedule=constant", "train.precision=fp64")
    for name in ("dropped_tokens", "depth_predictor_right", "depth_chosen"):
        assert numbers(cut, name) == numbers(whole, name)
        assert all(0.0 < share < 1.0 for share in numbers(whole, name))
    assert numbers(whole, "depth_chosen") == [0.5, 0.5]
    losses = numbers(whole, "depth_predictor_loss")
    assert numbers(cut, "depth_predictor_loss") == pytest.approx(losses, rel=1e-9)  # sums in another order (promise 2)
    assert losses == pytest.approx([0.69, 0.69], abs=0.05)  # ln 2 of a predictor that knows nothing yet


def weights_of(mesh: Mesh, folder: Path, overrides: list[str]) -> dict[str, tuple[int, ...]]:
    return {name: part.global_shape for name, part in build(folder, overrides, mesh).engine.parts.items()}


def test_a_rank_holds_the_weights_of_its_stages_and_no_others(tmp_path: Path) -> None:
    first, last = run_mesh(TWO, weights_of, tmp_path, [*PIPELINE, "model.num_layers=4"])
    assert {name.split(".")[1] for name in first if name.startswith("layers.")} == {"0", "1", "2"}
    assert {name.split(".")[1] for name in last if name.startswith("layers.")} == {"3"}  # the output costs two layers
    assert {name for name in first if "layers" not in name} == {"embedding.weight"}
    assert {name for name in last if "layers" not in name} == {"final_norm.weight", "output.weight"}


def same_twice(mesh: Mesh, folder: Path, overrides: list[str]) -> None:
    for name in ("one", "two"):
        start_on(mesh, folder / name, overrides)


@pytest.mark.slow
def test_the_same_pipeline_twice_is_bitwise_the_same(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    run_mesh(TWO, same_twice, tmp_path, [*ZBV, "train.steps=3"])
    assert checkpoint_bytes(tmp_path / "one", 3) == checkpoint_bytes(tmp_path / "two", 3)


def signalled(mesh: Mesh, folder: Path, overrides: list[str]) -> None:
    """Train; the rank of the last stage gets a SIGTERM in its second step."""
    steps = 0
    before = Tally.reduce

    def reduce(tally: Tally, on: Mesh) -> dict[str, torch.Tensor]:
        nonlocal steps
        steps += 1
        if steps == 1 and on.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(tally, on)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tally, "reduce", reduce)
        start_on(mesh, folder, overrides)


def test_a_signal_to_one_stage_stops_all_and_saves(tmp_path: Path) -> None:
    run_mesh(TWO, signalled, tmp_path, [*PIPELINE, "evaluation.every=0"])
    assert numbers(tmp_path, "step") == [1, 2]
    assert list(checkpoint_bytes(tmp_path, 2)) == ["rank_00000.bin", "rank_00001.bin"]


def poisoned(mesh: Mesh, folder: Path, overrides: list[str]) -> str:
    """Train with a weight of the first stage that is no number from the second step on."""
    before = loop.one_step

    def one_step(run, batch, step, *args, **named):  # type: ignore[no-untyped-def]
        if step == 1 and run.model.embedding is not None:
            with torch.no_grad():
                run.model.embedding.weight.fill_(float("nan"))
        return before(run, batch, step, *args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "one_step", one_step)
        with pytest.raises(NotANumberError) as stopped:
            start_on(mesh, folder, overrides)
    return str(stopped.value)


def test_a_weight_that_is_no_number_in_the_first_stage_stops_all_with_the_documents(tmp_path: Path) -> None:
    first, last = run_mesh(TWO, poisoned, tmp_path, [*PIPELINE, "evaluation.every=0"])
    assert first == last
    assert "step 2: loss = nan" in first
    documents = [line for line in first.splitlines() if "(document " in line]
    assert documents
    assert len(documents) == len(set(documents))


def group_error(mesh: Mesh, folder: Path, match: str) -> str:
    try:
        build(folder, [*PIPELINE, f'optimizer.groups=[{{match="{match}", weight_decay=0.5}}]'], mesh)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_group_of_the_optimizer_may_be_for_one_stage_only(tmp_path: Path) -> None:
    assert run_mesh(TWO, group_error, tmp_path, "output.*") == ["", ""]
    assert run_mesh(TWO, group_error, tmp_path, "layers.0.*") == ["", ""]
    first, last = run_mesh(TWO, group_error, tmp_path, "layers.7.*")
    assert first == last
    assert "matches no parameter" in first


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "overrides"),
    [("bf16", PIPELINE), ("bf16_autocast", ZBV), ("bf16_autocast", PIPELINE)],
)
def test_narrow_types_learn_the_same_in_stages(tmp_path: Path, precision: str, overrides: list[str]) -> None:
    exact, rounded = tmp_path / "exact", tmp_path / "rounded"
    exact.mkdir(), rounded.mkdir()
    layers = [text for text in overrides if text.startswith("model.")]
    start(exact, "train.precision=fp64", "learning_rate.schedule=constant", *layers)
    run_mesh(TWO, start_on, rounded, [*overrides, f"train.precision={precision}"])
    # bf16 keeps 8 bits: losses of about 5 agree to two digits.
    assert numbers(rounded, "loss") == pytest.approx(numbers(exact, "loss"), rel=2e-2)
    assert numbers(rounded, "loss") != numbers(exact, "loss")
