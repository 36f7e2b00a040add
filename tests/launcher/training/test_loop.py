"""What the training loop does besides stepping: flags, spikes, ramps, errors, precisions; and on every layout."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from rank_pool import run_mesh
from tiny_run import EP2, build, metrics, numbers, start, start_on

from meshwright.launcher.training import loop
from meshwright.launcher.training.loop import held_out_lines, held_out_of
from meshwright.launcher.training.stopping import NotANumberError, SpikeGuard
from meshwright.parallel.mesh import Mesh, Sizes


def test_training_learns_and_leaves_its_records(tmp_path: Path) -> None:
    start(tmp_path, "train.steps=30", "evaluation.every=10", "learning_rate.peak=0.02", picture=True)
    losses = numbers(tmp_path, "loss")
    assert len(losses) == 30
    assert losses[-1] < losses[0] - 1.0
    assert numbers(tmp_path, "validation_loss", "evaluation")[-1] < losses[0] - 1.0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["validation_loss"] == numbers(tmp_path, "validation_loss", "evaluation")[-1]
    for name in ("run.toml", "provenance.json", "tokenizer.json", "loss.png"):
        assert (tmp_path / "run" / name).stat().st_size > 0


@pytest.mark.parametrize(
    ("sizes", "overrides"),
    [
        pytest.param(EP2, ["parallel.ep=2"], marks=pytest.mark.slow),
        pytest.param(EP2, ["parallel.ep=2", "zero.stage=2", "recompute.mode=full"], marks=pytest.mark.slow),
        (Sizes(dp_shard=4), ["zero.stage=1", "train.micro_batch_size=1"]),
    ],
)
def test_a_run_shows_the_same_numbers_on_every_layout(tmp_path: Path, sizes: Sizes, overrides: list[str]) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    start(tmp_path / "one", "train.precision=fp64")
    run_mesh(sizes, start_on, tmp_path / "many", ["train.precision=fp64", *overrides])
    for kind, names in {"step": ("loss", "grad_norm", "router_loss/z"), "evaluation": ("validation_loss",)}.items():
        for name in names:
            ours = numbers(tmp_path / "many", name, kind)
            assert ours == pytest.approx(numbers(tmp_path / "one", name, kind), rel=1e-9), name
    assert numbers(tmp_path / "many", "tokens") == numbers(tmp_path / "one", "tokens")
    assert numbers(tmp_path / "many", "expert_entropy") == numbers(tmp_path / "one", "expert_entropy")


@pytest.mark.parametrize("size", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_micro_batches_that_do_not_divide_the_batch_change_nothing(tmp_path: Path, size: int) -> None:
    (tmp_path / "even").mkdir()
    (tmp_path / "uneven").mkdir()
    start(tmp_path / "even", "train.precision=fp64", "train.micro_batch_size=2")
    start(tmp_path / "uneven", "train.precision=fp64", f"train.micro_batch_size={size}")
    for kind, name in (("step", "loss"), ("step", "grad_norm"), ("evaluation", "validation_loss")):
        # fp64 sums in another order (promise 2)
        assert numbers(tmp_path / "uneven", name, kind) == pytest.approx(
            numbers(tmp_path / "even", name, kind), rel=1e-9
        )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_ends_the_run(tmp_path: Path, number: signal.Signals) -> None:
    _signal_at(2, number, tmp_path)
    assert numbers(tmp_path, "step") == [1, 2]
    assert (tmp_path / "run" / "checkpoints" / "step_00000002").is_dir()
    start(tmp_path)
    assert numbers(tmp_path, "step") == [1, 2, 3, 4, 5, 6]


def test_sigusr2_writes_a_checkpoint_and_goes_on(tmp_path: Path) -> None:
    _signal_at(2, signal.SIGUSR2, tmp_path, "checkpoint.keep_last=9")
    assert numbers(tmp_path, "step") == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "run" / "checkpoints" / "step_00000002").is_dir()


def _signal_at(step: int, number: signal.Signals, folder: Path, *overrides: str) -> None:
    """Start a run that receives a signal while it makes a step."""
    before = loop.one_step

    def one_step(*args, **kwargs):
        if args[2] == step - 1:
            os.kill(os.getpid(), number)
        return before(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "one_step", one_step)
        start(folder, *overrides)


def _one_rank_gets_a_signal(mesh: Mesh, folder: Path) -> None:
    before = loop.one_step

    def one_step(*args, **kwargs):
        if args[2] == 1 and mesh.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "one_step", one_step)
        start_on(mesh, folder, ["parallel.ep=2"])


def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path: Path) -> None:
    run_mesh(EP2, _one_rank_gets_a_signal, tmp_path)
    assert numbers(tmp_path, "step") == [1, 2]
    assert (tmp_path / "run" / "checkpoints" / "step_00000002").is_dir()


def _poison(run, step: int):
    """Make the loss of one step not a number, on this rank."""
    before = loop.one_step

    def one_step(run, batch, at, *args, **kwargs):
        if at == step:
            with torch.no_grad():
                run.model.final_norm.weight.fill_(float("nan"))
        return before(run, batch, at, *args, **kwargs)

    return one_step


def test_a_loss_that_is_no_number_names_step_documents_and_checkpoint(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "one_step", _poison(None, 4))
        with pytest.raises(NotANumberError, match="step 5: loss = nan") as stopped:
            start(tmp_path)
    text = str(stopped.value)
    assert ".txt (document " in text
    assert "last good checkpoint is" in text
    assert "step_00000003" in text
    assert not (tmp_path / "run" / "checkpoints" / "step_00000005").exists()
    assert numbers(tmp_path, "step") == [1, 2, 3, 4]
    start(tmp_path)  # and from that checkpoint it goes on
    assert numbers(tmp_path, "step") == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_of_the_weights_at_fault_is_not_called_good(tmp_path: Path) -> None:
    poisoned = f"newest checkpoint, {tmp_path}/run/checkpoints/step_00000004, holds the weights that gave this; "
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "one_step", _poison(None, 4))
        with pytest.raises(NotANumberError) as stopped:
            start(tmp_path, "checkpoint.every=2", "checkpoint.keep_last=2")
        assert f"{poisoned}the one before it is {tmp_path}/run/checkpoints/step_00000002;" in str(stopped.value)
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000002")
        with pytest.raises(NotANumberError) as stopped:
            start(tmp_path, "checkpoint.every=2")
        assert f"{poisoned}there is none before;" in str(stopped.value)


def _nan_on_one_rank(mesh: Mesh, folder: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        if mesh.rank == 1:
            patch.setattr(loop, "one_step", _poison(None, 1))
        with pytest.raises(NotANumberError) as stopped:
            start_on(mesh, folder, ["zero.stage=0"])
    return str(stopped.value)


def test_a_loss_that_is_no_number_on_one_rank_stops_all_ranks_with_its_documents(tmp_path: Path) -> None:
    first, second = run_mesh(Sizes(dp_shard=2), _nan_on_one_rank, tmp_path)
    assert first == second
    assert "step 2: loss = nan" in first
    assert "there is no checkpoint yet" in first


def test_a_norm_spike_is_left_out_and_counted() -> None:
    guard = SpikeGuard(3.0)
    assert not any(guard.is_spike(1.0 + 0.01 * at) for at in range(16))
    assert guard.is_spike(3.6)
    assert not guard.is_spike(2.9)
    assert len(guard.norms) == 17
    assert not SpikeGuard(0.0, [1.0] * 20).is_spike(1e9)


def test_a_skipped_step_leaves_the_weights_alone(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpikeGuard, "is_spike", lambda self, norm: True)
        run = start(tmp_path, "train.steps=2")
    fresh = build(tmp_path, [])
    for name, part in run.engine.parts.items():
        assert torch.equal(part.parameter, fresh.engine.parts[name].parameter), name
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["skipped_steps"] == 2


def test_the_batch_size_follows_its_ramp(tmp_path: Path) -> None:
    ramp = "train.batch_ramp=[{samples=8, global_batch_size=4}, {samples=16, global_batch_size=2}]"
    start(tmp_path, ramp, "train.steps=7")
    assert numbers(tmp_path, "samples") == [4, 8, 10, 12, 14, 16, 24]
    assert numbers(tmp_path, "tokens") == [64, 64, 32, 32, 32, 32, 128]


@pytest.mark.parametrize(
    "precision",
    [pytest.param("bf16", marks=pytest.mark.slow), "bf16_autocast", pytest.param("fp32", marks=pytest.mark.slow)],
)
def test_every_precision_learns_the_same(tmp_path: Path, precision: str) -> None:
    (tmp_path / "exact").mkdir()
    (tmp_path / "rounded").mkdir()
    start(tmp_path / "exact", "train.precision=fp64")
    start(tmp_path / "rounded", f"train.precision={precision}")
    # bf16 keeps 8 bits: losses of about 5 agree to two digits; fp32 to six.
    within = 1e-5 if precision == "fp32" else 2e-2
    assert numbers(tmp_path / "rounded", "loss") == pytest.approx(numbers(tmp_path / "exact", "loss"), rel=within)
    assert numbers(tmp_path / "rounded", "loss") != numbers(tmp_path / "exact", "loss")


def test_masked_documents_change_what_is_computed(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "masked").mkdir()
    start(tmp_path / "open", "train.steps=2", "data.seq_len=64")
    start(tmp_path / "masked", "train.steps=2", "data.seq_len=64", "data.mask_documents=true")
    assert numbers(tmp_path / "open", "loss")[0] != numbers(tmp_path / "masked", "loss")[0]


def test_events_of_a_run_stand_in_its_records(tmp_path: Path) -> None:
    start(tmp_path)
    texts = [record["text"] for record in metrics(tmp_path) if record["kind"] == "event"]
    assert sum("saving" in text for text in texts) == 2


def test_a_split_with_fewer_samples_than_are_asked_for_is_told(tmp_path: Path) -> None:
    enough = held_out_of(build(tmp_path, []))
    assert enough is not None
    there = enough.order.samples_per_epoch
    assert held_out_lines(build(tmp_path, [f"evaluation.samples={there}"])) == []
    told = f"evaluation.samples = {there + 1}: the validation split has {there}, and all are used"
    assert held_out_lines(build(tmp_path, [f"evaluation.samples={there + 1}"])) == [told]
    assert held_out_lines(build(tmp_path, [f"evaluation.samples={there + 1}", "evaluation.every=0"])) == []
