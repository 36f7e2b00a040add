"""A killed run goes on as the unbroken one, and what would not is told."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meshwright.data import batches
from meshwright.launcher.build import sizes_of
from meshwright.launcher.commands.verify_resume import verify_resume as command
from meshwright.launcher.proof import passes, resume, resume_report, trained
from meshwright.launcher.proof.forked import NoAnswerError
from meshwright.launcher.proof.go_on_with import go_on_with
from meshwright.launcher.proof.record import AtTokens, RankRecord, StepRecord
from meshwright.launcher.runfile.messages import ConfigError
from meshwright.launcher.runfile.read import read_run_file
from meshwright.launcher.training import loop, saving
from meshwright.launcher.training.progress import Progress
from meshwright.launcher.training.stopping import SpikeGuard
from meshwright.parallel.checkpoint import verify
from meshwright.parallel.checkpoint.describe import HeldPart
from meshwright.parallel.checkpoint.folder import list_checkpoints
from meshwright.parallel.checkpoint.plan import PartSavePlanner
from meshwright.parallel.mesh import Mesh, Sizes, build_mesh

RUNS = Path(__file__).resolve().parents[3] / "runs"


def plan_of(name: str, to: str, *overrides: str, world: int = 2, steps: int = 2) -> resume.ResumePlan:
    run_file = read_run_file(RUNS / name, overrides, world_size=world)
    return resume.plan_resume(run_file, world, go_on_with(to, run_file, world), steps)


def test_a_run_goes_on_with_tensor_parallelism_and_bit_for_bit_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(RUNS / "dense_tiny.toml", "tp=2,dp_shard=1", [], steps=2, out=tmp_path / "answer.json")
    printed = capsys.readouterr().out
    assert "2 steps, a kill, 2 steps, against 4 unbroken" in printed
    assert "the resumed run is the unbroken one" in printed
    written = json.loads((tmp_path / "answer.json").read_text())
    same, other = written["results"]
    assert (same["precision"], same["is_bitwise"], same["worst"]) == ("fp32", True, 0.0)
    assert (other["precision"], other["is_bitwise"]) == ("fp64", False)
    assert other["worst"] < 1e-12
    assert 0 < other["worst_held"] < 1e-9
    assert other["tokens"] == 2 * 2 * 6 * 32  # tokens and targets of two steps of six samples


def test_a_run_that_fails_without_a_kill_is_no_difference() -> None:
    with pytest.raises(ConfigError, match=r"gradient norm = nan.*there is nothing to compare a resumed one with"):
        resume.verify_resume(plan_of("dense_tiny.toml", "dp_shard=1,tp=2", "learning_rate.peak=1e9"))


def test_counted_samples_last_for_all_steps() -> None:
    table = plan_of("dense_tiny.toml", "dp_shard=2").narrowed.run_file
    table = table.model_copy(update={"train": table.train.model_copy(update={"steps": 200})})
    run = passes.build(table, "fp64", build_mesh(Sizes()))
    assert run.store.splits["train"].num_tokens > 201 * table.train.global_batch_size * table.data.seq_len


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "to", "overrides"),
    [
        ("moe_tiny.toml", "dp_shard=4", ()),
        ("moe_tiny.toml", "ep=1,dp_shard=1,pp=2", ("train.micro_batch_size=8", "checkpoint.asynchronous=true")),
        ("dense_tiny.toml", "tp=4,dp_shard=1", ("zero.stage=3", "train.precision=bf16", "optimizer.kind=muon")),
    ],
)
def test_other_layouts_go_on_too(name: str, to: str, overrides: tuple[str, ...]) -> None:
    results = resume.verify_resume(plan_of(name, to, *overrides))
    assert [result.differences for result in results] == [[], []]


@pytest.mark.slow
def test_a_resume_that_skips_samples_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = saving.progress_of

    def one_sample_on(state: dict[str, object], path: Path) -> Progress:
        progress = real(state, path)
        progress.samples += 1
        return progress

    monkeypatch.setattr(saving, "progress_of", one_sample_on)
    result = resume.verify_resume(plan_of("dense_tiny.toml", "dp_shard=2"))[0]
    assert not result.is_same
    assert "step 3, rank 1: 32 of 96 tokens are others" in result.differences
    assert "step 3: 32 of 192 tokens are on no rank" in result.differences


def went_on(plan: resume.ResumePlan) -> resume.ResumeResult:
    """Return what came of the first way to another layout."""
    before, after = plan.pairs[0]
    result = resume.ResumeResult(before, after, "fp64", is_bitwise=before == after)
    resume._go_on(plan, result)
    return result


@pytest.mark.slow
def test_a_position_that_counts_what_was_read_ahead_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = batches._Reader.get

    def ahead(reader: batches._Reader) -> tuple[batches.Batch, int]:
        batch, at = real(reader)
        return batch, at + 2 * len(batch.sample)

    monkeypatch.setattr(batches._Reader, "get", ahead)
    plan = plan_of("dense_tiny.toml", "dp_shard=2", steps=1)
    assert plan.narrowed.run_file.data.prefetch == plan.run_file.data.prefetch == 2
    assert "tokens are others" in went_on(plan).differences[0]


@pytest.mark.slow
def test_moments_that_are_lost_on_another_layout_are_caught_after_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    real = saving.load_checkpoint

    def without_moments(path: Path, tensors: dict[str, HeldPart], mesh: Mesh, *more: Any) -> None:
        real(path, tensors, mesh, *more)
        for name, part in tensors.items():
            if name.startswith("optimizer.") and mesh.tp.is_split:
                part.tensor.zero_()

    plan = plan_of("dense_tiny.toml", "tp=2,dp_shard=1", steps=1)
    assert went_on(plan).differences == []
    monkeypatch.setattr(saving, "load_checkpoint", without_moments)
    result = went_on(plan)
    assert result.worst < 1e-9  # losses and norms alone are those of the step that the weights make
    assert all(line.startswith("at the end: ") for line in result.differences)
    assert any("optimizer.exp_avg." in line for line in result.differences)


@pytest.mark.slow
def test_a_save_in_the_background_without_a_copy_is_caught_however_fast_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = plan_of("dense_tiny.toml", "dp_shard=1", "checkpoint.asynchronous=true", world=1, steps=1)
    assert went_on(plan).differences == []
    monkeypatch.setattr(PartSavePlanner, "snapshot", lambda *_: None)
    assert went_on(plan).differences[0].startswith("step 2, rank 0: loss ")


@pytest.mark.slow
@pytest.mark.parametrize("name", [each.name for each in fields(Progress)])
def test_a_value_that_does_not_come_along_is_caught(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real, new = saving.progress_of, Progress()
    monkeypatch.setattr(saving, "progress_of", lambda *given: replace(real(*given), **{name: getattr(new, name)}))
    differences = went_on(plan_of("dense_tiny.toml", "dp_shard=1", world=1, steps=1)).differences
    told = {"step": "2 steps were made, not 1", "samples": "tokens are others"}
    assert told.get(name, f"at the end, rank 0: {name}") in "\n".join(differences)


@pytest.mark.slow
def test_norms_that_the_guard_forgets_are_caught_on_another_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SpikeGuard", lambda multiple, norms: SpikeGuard(multiple, norms[:1]))
    plan = plan_of("dense_tiny.toml", "tp=2,dp_shard=1", steps=1)
    assert went_on(plan).differences == [f"at the end, rank {rank}: norms has 2 entries, not 3" for rank in (0, 1)]


@pytest.mark.slow
def test_a_run_that_goes_on_from_an_older_checkpoint_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of("dense_tiny.toml", "dp_shard=1", "checkpoint.keep_last=2", world=1, steps=2)
    assert went_on(plan).differences == []
    monkeypatch.setattr(verify, "_recovered_steps", list_checkpoints)
    assert went_on(plan).differences == ["3 steps were made, not 2"]


def test_a_run_begins_with_a_past_in_every_value_that_its_first_steps_do_not_fill() -> None:
    past, new = asdict(trained._PAST), asdict(Progress())
    assert [name for name in past if past[name] == new[name]] == ["step"]


def record_of(loss: float) -> RankRecord:
    return RankRecord(steps=[StepRecord(learning_rate=1.0, loss=loss, norm=1.0)])


@pytest.mark.parametrize(
    ("one", "other"), [(1.0, np.nan), (1.0, np.inf), (np.nan, 1.0), (np.inf, np.inf), (np.nan, np.nan)]
)
@pytest.mark.parametrize("is_bitwise", [True, False])
def test_a_loss_that_is_no_number_shows_nothing(one: float, other: float, is_bitwise: bool) -> None:
    result = resume.ResumeResult(Sizes(), Sizes(), "fp64", is_bitwise)
    resume.compare_steps(result, [record_of(other)], [record_of(one)], first_step=3)
    assert result.differences == [f"step 4, rank 0: loss {one!r}, unbroken {other!r}: that shows nothing"]


@pytest.mark.parametrize("is_bitwise", [True, False])
def test_another_learning_rate_is_told_on_the_rank_that_has_it(is_bitwise: bool) -> None:
    result = resume.ResumeResult(Sizes(), Sizes(tp=2), "fp64", is_bitwise)
    before, after = record_of(1.0), [record_of(1.0), record_of(1.0)]
    after[1].steps[0].learning_rate = float(np.nextafter(1.0, 2.0))
    resume.compare_steps(result, [before], after, first_step=3)
    assert result.differences == ["step 4, rank 1: learning rate 1.0000000000000002, not 1.0"]


@pytest.mark.slow
def test_a_learning_rate_of_another_step_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real, path = loop.learning_rate_at, trained.resume
    plan = plan_of("dense_tiny.toml", "dp_shard=1", world=1, steps=1)

    def resumed(*given: Any) -> Any:
        began = path(*given)
        if began.checkpoint is not None:
            monkeypatch.setattr(loop, "learning_rate_at", lambda step, *more: real(step - 1, *more))
        return began

    monkeypatch.setattr(trained, "resume", resumed)
    assert went_on(plan).differences[0].startswith("step 2, rank 0: learning rate ")


FOUR_PLACES = [(5, 0), (5, 1), (6, 0), (6, 1)]


def record_with(ids: dict[tuple[int, int], int], what: str) -> RankRecord:
    """Return what a rank leaves that has these ids at (sample, position)."""
    places = np.array(list(ids), int).reshape(-1, 2)
    record = record_of(1.0)
    record.steps[0].at_tokens = {what: AtTokens(places[:, 0], places[:, 1], np.array(list(ids.values()), int))}
    return record


@pytest.mark.parametrize("what", ["tokens", "targets"])
@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_an_id_that_is_wrong_on_one_of_the_ranks_that_have_the_token_is_told(wrong: int, what: str) -> None:
    result = resume.ResumeResult(Sizes(), Sizes(tp=3), "fp64", is_bitwise=False)
    right = dict(zip(FOUR_PLACES, (7, 8, 9, 10), strict=True))
    found = [record_with(right | ({(6, 1): 11} if rank == wrong else {}), what) for rank in range(3)]
    resume.compare_steps(result, [record_with(right, what)], found, first_step=3)
    assert result.differences == [f"step 4, rank {wrong}: 1 of 4 {what} are others"]
    assert result.tokens == 4
    again = resume.ResumeResult(Sizes(tp=3), Sizes(), "fp64", is_bitwise=False)
    resume.compare_steps(again, found, [record_with(right, what)], first_step=3)
    assert any("step 4, unbroken, rank " in line for line in again.differences)


def test_a_token_that_no_rank_has_and_one_that_is_none_of_the_steps_are_told() -> None:
    result = resume.ResumeResult(Sizes(), Sizes(dp_shard=2), "fp64", is_bitwise=False)
    whole = dict(zip(FOUR_PLACES, (7, 8, 9, 10), strict=True))
    found = [record_with({(5, 0): 7, (5, 1): 8}, "tokens"), record_with({(6, 0): 9, (7, 1): 10}, "tokens")]
    resume.compare_steps(result, [record_with(whole, "tokens")], found, first_step=3)
    assert result.differences == [
        "step 4, rank 1: 1 of 2 tokens are others",
        "step 4: 1 of 4 tokens are on no rank",
    ]


def test_ranks_that_share_the_tokens_or_have_none_of_them_have_the_same() -> None:
    result = resume.ResumeResult(Sizes(), Sizes(dp_shard=2), "fp64", is_bitwise=False)
    whole = dict(zip(FOUR_PLACES, (7, 8, 9, 10), strict=True))
    halves = [record_with(dict(list(whole.items())[part]), "tokens") for part in (slice(2), slice(2, 4))]
    resume.compare_steps(result, [record_with(whole, "tokens")], [*halves, record_of(1.0)], first_step=3)
    assert result.differences == []
    assert result.tokens == 4


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ((2.0, 90), []),
        ((2.0 + 1e-11, 90), []),
        ((2.25, 90), ["step 4, rank 0: validation loss 2.25, not 2.0: off by 0.12"]),
        ((2.0, 60), ["step 4, rank 0: evaluated (2.0, 60), not (2.0, 90)"]),
        (None, ["step 4, rank 0: evaluated None, not (2.0, 90)"]),
    ],
)
def test_an_evaluation_is_compared_too(other: tuple[float, int] | None, told: list[str]) -> None:
    result = resume.ResumeResult(Sizes(), Sizes(tp=2), "fp64", is_bitwise=False)
    before, after = record_of(1.0), record_of(1.0)
    before.steps[0].evaluation, after.steps[0].evaluation = (2.0, 90), other
    resume.compare_steps(result, [before], [after], first_step=3)
    assert result.differences == told


def test_ranks_that_give_no_answer_are_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: object) -> None:
        raise NoAnswerError("rank 1 of 2 was killed by SIGKILL")

    monkeypatch.setattr(resume, "_go_on", slow)
    results = resume.verify_resume(plan_of("dense_tiny.toml", "dp_shard=2"))
    assert not any(result.is_same for result in results)
    first, *rest = resume_report.ending(results)
    assert first.startswith(f"NO ANSWER from {len(results)} of {len(results)} ways")
    assert not any("DIFFERENT" in line for line in rest)


def test_a_rank_that_is_not_killed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "train_rank", lambda *args, **keys: trained.Trained())
    result = resume.verify_resume(plan_of("dense_tiny.toml", "dp_shard=2"))[0]
    assert result.differences == ["a rank of 2 came to its end before it could be killed"]


def test_axes_that_are_not_named_stay() -> None:
    run_file = read_run_file(RUNS / "moe_tiny.toml", [], world_size=4)
    assert sizes_of(*go_on_with("dp_shard=8", run_file, 4)) == Sizes(dp_shard=8, ep=2)
    assert sizes_of(*go_on_with("ep=4", run_file, 4)) == Sizes(dp_shard=4, ep=4)
    assert sizes_of(*go_on_with("ep=1, dp_replicate=2", run_file, 4)) == Sizes(dp_replicate=2, dp_shard=2)


def test_a_large_layout_goes_on_by_its_sublayouts() -> None:
    plan = plan_of("qwen3_30b_a3b.toml", "tp=4,dp_shard=16", world=64)
    assert all(sizes.world <= 8 for pair in plan.pairs for sizes in pair)
    assert {pair[0].tp for pair in plan.pairs} == {1}
    assert max(pair[1].tp for pair in plan.pairs) > 1


@pytest.mark.parametrize(("seq_len", "tp"), [(6, 2), (18, 2)])
def test_samples_that_only_the_large_layout_cuts_evenly_go_on_too(seq_len: int, tp: int) -> None:
    keys = ("parallel.cp=3", f"parallel.tp={tp}", f"data.seq_len={seq_len}", "train.global_batch_size=24")
    plan = plan_of("dense_tiny.toml", "cp=1,dp_shard=8", *keys, world=9 * tp)
    assert {axis for pair in plan.pairs for axis in ("cp", "tp") if getattr(pair[0], axis) > 1} == {"cp", "tp"}
    assert all(sizes.world <= 8 for pair in plan.pairs for sizes in pair)


@pytest.mark.parametrize(
    ("to", "told"),
    [
        ("tq=2", "--to 'tq=2': is no axis=size; the axes are pp, dp_replicate"),
        ("tp", "--to 'tp': the size must be a whole number of at least 1"),
        ("dp_shard=0", "--to 'dp_shard=0': the size must be a whole number of at least 1"),
        ("tp=2,dp_shard=1", "parallel.tp = 2: must divide model.num_heads = 5; one of [1] would fit"),
        ("tp=2,dp_shard=1,tp=4", "--to 'tp=4': tp is named before, as tp=2; name each axis once"),
        ("tp=" + "9" * 5000, "the size must be a whole number of at least 1"),
        (
            "tp=5",
            "--to 'tp=5': needs 10 ranks or a multiple; the run has 2 (from the run file), and --to must keep this",
        ),
        ("ep=4", "unless it names dp_shard; ep of [1, 2] or -n 4 would fit"),
        ("dp_shard=3", "parallel.ep = 2: ep * etp = 2 must divide the 3 ranks"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(to: str, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        plan_of("moe_tiny.toml", to)
    assert told in str(refused.value)


@pytest.mark.parametrize(("world", "origin"), [(0, "the run file"), (2, "-n")])
def test_a_layout_of_more_ranks_is_refused_with_the_number_of_the_run_and_where_it_is_from(
    world: int, origin: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refused:
        command(RUNS / "dense_tiny.toml", "tp=4", [], world_size=world, out=tmp_path / "answer.json")
    assert f"the run has 2 (from {origin})" in str(refused.value)
    assert "tp of [1, 2] or -n 4 would fit" in str(refused.value)
    assert "world size" not in str(refused.value)


def test_where_no_number_of_ranks_would_fit_none_is_named() -> None:
    with pytest.raises(ConfigError) as refused:
        plan_of("dense_tiny.toml", "tp=1024")
    assert str(refused.value).endswith("unless it names dp_shard; tp of [1, 2] would fit")


def test_an_answer_that_could_not_be_written_is_told_before_anything_is_started(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a folder, and must be a file; --out .*verify_resume\.json would fit"):
        command(RUNS / "dense_tiny.toml", "tp=2", [], out=tmp_path)
