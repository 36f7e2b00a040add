"""A proof from end to end: on the product's own path, with a plain verdict, a file and an exit status."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from meshwright.kernels.matmul import grouped
from meshwright.launcher.commands.prove import prove as command
from meshwright.launcher.proof import prove as proof
from meshwright.launcher.proof.compare import Tie
from meshwright.launcher.proof.forked import NoAnswerError
from meshwright.launcher.proof.passes import passes_of, reference_passes
from meshwright.launcher.proof.record import RankRecord, StepRecord
from meshwright.launcher.proof.report import as_json, ending, heading, row
from meshwright.launcher.proof.sublayouts import Cover
from meshwright.launcher.proof.world import usual_world
from meshwright.launcher.runfile.messages import ConfigError
from meshwright.launcher.runfile.read import read_run_file
from meshwright.parallel.config import ParallelConfig
from meshwright.parallel.mesh import Sizes

RUNS = Path(__file__).resolve().parents[3] / "runs"


def plan_of(name: str, *overrides: str, world: int = 2, passes: tuple[str, ...] = proof.PASSES) -> proof.Plan:
    plan = proof.plan_proof(read_run_file(RUNS / name, overrides, world_size=world), world)
    return proof.Plan(plan.run_file, plan.target, plan.cover, plan.narrowed, passes)


def test_the_tiny_mixture_of_experts_computes_what_one_process_computes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(RUNS / "moe_tiny.toml", [], out=tmp_path / "deep" / "proof.json")
    printed = capsys.readouterr().out
    assert "moe_tiny.toml: 2 ranks (dp_shard=2, ep=2, ZeRO-1, fp32)" in printed
    assert "  model.hidden_size: 160 -> 24" in printed
    assert "the same as one process" in printed
    written = json.loads((tmp_path / "deep" / "proof.json").read_text())
    (result,) = written["results"]
    assert written["is_same"]
    assert set(result["passes"]) == {"exact", "fast", "checkpoint"}
    assert 0 < result["passes"]["exact"]["worst"] < 1e-11
    assert not any(
        child.status() != psutil.STATUS_ZOMBIE for child in psutil.Process().children() if "rank" in str(child)
    )


def test_where_rounding_decides_between_experts_the_ranks_take_over_what_one_process_chose() -> None:
    # Experts that are all but equally likely: in fp32 one process chooses others than in fp64, and so do the ranks.
    few = ("model.init_std=1e-5", "zero.stage=0", "parallel.dp_shard=2")
    done = proof.prove(plan_of("moe_tiny.toml", *few, passes=("fast",)))
    assert done.is_same, [result.first for result in done.results]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "world", "overrides"),
    [
        ("dense_tiny.toml", 2, ()),
        ("dense_tiny.toml", 8, ("parallel.tp=2", "parallel.dp_replicate=2", "zero.stage=3", "train.precision=bf16")),
        ("llama3_8b.toml", 64, ("parallel.tp=16",)),
        ("qwen3_30b_a3b.toml", 64, ("parallel.tp=4", "parallel.etp=2")),
        ("moe_tiny.toml", 8, ("parallel.pp=2", "parallel.etp=2", "train.micro_batch_size=4", "recompute.mode=full")),
    ],
)
def test_larger_layouts_compute_what_one_process_computes(name: str, world: int, overrides: tuple[str, ...]) -> None:
    done = proof.prove(plan_of(name, *overrides, world=world))
    assert done.is_same, [result.first for result in done.results]
    assert done.blame is None


@pytest.mark.slow
def test_a_difference_is_told_with_its_tensor_step_and_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of("moe_tiny.toml", passes=("exact",))
    real = proof.run_passes

    def one_number_off(*args: object, **named: object) -> dict[str, RankRecord]:
        records: dict[str, RankRecord] = real(*args, **named)  # type: ignore[arg-type]
        run_file, rank = args[0], args[-1]
        if run_file.parallel.ep == 2 and rank == 1:  # type: ignore[attr-defined]
            records["exact"].steps[1].gradients["layers.1.feedforward.part.experts.up"].values[0, 0, 0] += 1e-3
        return records

    monkeypatch.setattr(proof, "run_passes", one_number_off)
    done = proof.prove(plan)
    assert not done.is_same
    (result,) = done.results
    assert result.first.startswith("exact: step 2, gradient of layers.1.feedforward.part.experts.up: off by")
    assert result.first.endswith("most on rank 1")
    assert done.blame == proof.Blame(Sizes(dp_shard=2, ep=2), ("ep",))
    told = list(ending(done))
    assert told[0].startswith("DIFFERENT from one process on 1 of 1 layouts")
    assert told[-1] == "  axis     ep; the smallest layout that shows it is dp_shard=2, ep=2"
    assert "differs" in next(iter(row(plan, result)))
    written = json.dumps(as_json("x", done), allow_nan=False)
    assert json.loads(written)["blame"]["axes"] == ["ep"]


def test_ranks_that_fail_are_a_difference_with_their_words(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of("dense_tiny.toml", passes=("exact",))
    real = proof.run_passes

    def failing(*args: object, **named: object) -> dict[str, RankRecord]:
        if args[-1] == 1:
            raise AssertionError("output.weight got no gradient in this step")
        return real(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(proof, "run_passes", failing)
    done = proof.prove(plan)
    assert done.results[0].first == "rank 1 of 2 failed: AssertionError: output.weight got no gradient in this step"
    assert done.blame is not None
    assert done.blame == proof.Blame(Sizes(dp_shard=2), ("dp_shard",), is_only=True)
    told = list(ending(done))[-1]
    assert (
        told
        == "  axis     dp_shard, the only axis that the layout has; the smallest layout that shows it is dp_shard=2"
    )


def test_a_layout_that_gives_no_answer_is_no_difference_and_names_no_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(_self: proof.Judge, _size: int, _work: object) -> None:
        raise NoAnswerError("of 2 ranks [0, 1] did not answer within 150 s, and were ended")

    plan = plan_of("dense_tiny.toml", passes=("exact",))
    monkeypatch.setattr(proof.Judge, "__init__", lambda self, run_file, passes: vars(self).update(one_judge(run_file)))
    monkeypatch.setattr(proof.Judge, "_answers", slow)
    done = proof.prove(plan)
    assert not done.is_same
    assert done.blame is None
    told = list(ending(done))
    assert told[0].startswith("NO ANSWER from 1 of 1 layouts")
    assert not any("DIFFERENT" in line or "axis" in line for line in told)
    assert as_json("x", done)["results"][0]["gave_no_answer"]


def one_judge(run_file: object) -> dict[str, object]:
    return {"run_file": run_file, "passes": ("exact",), "choices": {}}


def test_ranks_have_longer_where_one_process_took_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((0.0, 2.5))
    monkeypatch.setattr(proof, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(proof.Judge, "_answers", lambda *_: [{}])
    assert proof.Judge(plan_of("dense_tiny.toml").narrowed.run_file, ("exact",)).limit == 250.0


EVERYTHING = {"aten::_grouped_mm", "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_fused_adamw_"}


EVERY_WORK = frozenset({"attention", "experts", "adamw"})


def missing_paths(
    plan: proof.Plan, one: set[str], *ranks: set[str], work: frozenset[str] = EVERY_WORK
) -> list[tuple[str, str]]:
    """Return what is missing where the first rank does `work`, and the others everything."""
    verdict = proof.Verdict([])
    table = proof.on_layout(plan.narrowed.run_file, plan.cover.layouts[0])
    records = [RankRecord(operators=frozenset(operators), work=EVERY_WORK) for operators in ranks]
    records[0].work = work
    proof.require_fast_paths(verdict, table, records, RankRecord(operators=frozenset(one)))
    return [(difference.name, difference.note) for difference in verdict.differences]


def test_a_fast_path_that_a_rank_does_not_take_is_a_difference() -> None:
    plan, note = plan_of("moe_tiny.toml"), "the fast path was not taken"
    for missing in EVERYTHING:
        some = EVERYTHING - {missing}
        assert missing_paths(plan, EVERYTHING, EVERYTHING, EVERYTHING) == []
        assert missing_paths(plan, EVERYTHING, some, some) == [(missing, note)]
        assert missing_paths(plan, some, some) == [(missing, note + proof.NOR_ALONE)]
        # Another rank's fast path hides it no longer.
        assert missing_paths(plan, EVERYTHING, some, EVERYTHING) == [(missing, f"{note} on rank 0")]
        assert missing_paths(plan, EVERYTHING, EVERYTHING, some, some) == [(missing, f"{note} on ranks 1, 2")]
        (of_missing,) = [work for work, name in proof._OPERATORS.items() if name == missing]
        # A stage may have no layer of a kind; but where the model has some, a rank must.
        assert missing_paths(plan, EVERYTHING, some, EVERYTHING, work=EVERY_WORK - {of_missing}) == []
        assert missing_paths(plan, EVERYTHING, EVERYTHING, work=EVERY_WORK - {of_missing}) == [(missing, note)]


def test_each_rank_says_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a pipeline the second stage alone has experts; with ep both have, and one goes the slow way."""
    keys = ("model.pattern=*-*E", "model.num_layers=2", "parallel.pp=2", "parallel.ep=1", "train.micro_batch_size=4")
    seen: list[list[RankRecord]] = []
    real = proof.require_fast_paths
    note = lambda verdict, table, ranks, one: (seen.append(ranks), real(verdict, table, ranks, one))  # noqa: E731
    monkeypatch.setattr(proof, "require_fast_paths", note)
    done = proof.prove(plan_of("moe_tiny.toml", *keys, passes=("fast",)))
    assert done.is_same, [result.first for result in done.results]
    assert [result.notes for result in done.results] == [[]]
    assert [record.work for record in seen[0]] == [EVERY_WORK - {"experts"}, EVERY_WORK]
    slow_run = proof.run_passes

    def slow_on_rank_1(*args: object, **named: object) -> dict[str, RankRecord]:
        if args[-1] == 1:
            monkeypatch.setattr(grouped, "slower_than_grouped", lambda *_given: "is left out here")
        return slow_run(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(proof, "run_passes", slow_on_rank_1)
    judged = proof.Judge(plan_of("moe_tiny.toml").narrowed.run_file, ("fast",)).judge(Sizes(dp_shard=2, ep=2))
    assert judged.first == "fast: step 1, operator of aten::_grouped_mm: the fast path was not taken on rank 1"


@pytest.mark.parametrize(
    ("keys", "world", "wide"),
    [
        (("model.moe.expert_hidden_size=50",), 2, "42 (168 bytes)"),
        (("model.hidden_size=150",), 2, "42 (168 bytes)"),
        (("model.moe.expert_hidden_size=60", "parallel.etp=2"), 4, "30 (120 bytes)"),
    ],
)
def test_widths_that_grouped_products_do_not_take_are_told_and_are_no_difference(
    keys: tuple[str, ...], world: int, wide: str
) -> None:
    plan = plan_of("moe_tiny.toml", *keys, world=world)
    table = proof.on_layout(plan.narrowed.run_file, plan.cover.layouts[0])
    (note,) = proof.grouped_lines(table.model, table.parallel.etp, torch.device("cpu"), torch.float32)
    assert note.endswith(f"asks for rows of a multiple of 16 bytes, and a rank's are {wide} wide")
    assert missing_paths(plan, EVERYTHING, EVERYTHING - {"aten::_grouped_mm"}) == []
    assert missing_paths(plan, EVERYTHING, {"aten::_grouped_mm"}) != []
    result = proof.LayoutResult(plan.cover.layouts[0], notes=[note])
    assert list(row(plan, result))[1:] == [f"    not used: {note}"]


@pytest.mark.slow
def test_a_layout_of_unaligned_widths_is_the_same_as_one_process() -> None:
    done = proof.prove(plan_of("moe_tiny.toml", "model.moe.expert_hidden_size=60", "parallel.etp=2", world=4))
    assert done.is_same, [result.first for result in done.results]
    assert ["F.grouped_mm asks for rows" in note for result in done.results for note in result.notes] == [True]


def test_what_one_process_does_not_do_either_comes_with_no_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    judged = proof.Verdict([])
    judged.miss("aten::_grouped_mm", f"the fast path was not taken{proof.NOR_ALONE}", what="operator")
    monkeypatch.setattr(proof.Judge, "__init__", lambda self, *_: None)
    judge = lambda _self, sizes, **_: proof.LayoutResult(sizes, {"fast": judged})  # noqa: E731
    monkeypatch.setattr(proof.Judge, "judge", judge)
    done = proof.prove(plan_of("moe_tiny.toml", passes=("fast",)))
    assert not done.is_same
    assert done.blame is None
    assert list(ending(done))[-1].endswith("the fast path was not taken, and one process does not take it either")


def test_one_process_whose_loss_is_no_number_shows_nothing() -> None:
    plan = plan_of("dense_tiny.toml", "learning_rate.peak=1e9", passes=("exact",))
    with pytest.raises(ConfigError, match=r"norm = nan in step 2 .exact., to which nothing can be compared"):
        proof.prove(plan)


def test_a_step_that_is_not_clipped_is_told() -> None:
    table, one = plan_of("moe_tiny.toml").narrowed.run_file, RankRecord([StepRecord(norm=0.5), StepRecord(norm=0.005)])
    assert proof.unclipped(table, one) == ["clipping, a step's norm is 0.005, not above 0.01"]
    assert proof.unclipped(table, RankRecord(one.steps[:1])) == []


def test_near_ties_are_listed_and_those_beyond_twenty_counted() -> None:
    plan = plan_of("moe_tiny.toml")
    verdict = proof.Verdict([], ties=[Tie(0, "layers.0.router", 3, position, 2e-8) for position in range(23)])
    done = proof.Proof(plan, [proof.LayoutResult(Sizes(tp=2), {"fast": verdict})])
    told = list(ending(done))
    assert told[0] == "23 tokens went to other experts in fp32, each within rounding of a tie"
    assert told[1] == "  tp=2: step 1, layers.0.router, sample 3, position 0, margin 2.0e-08"
    assert told[20].endswith("position 19, margin 2.0e-08")
    assert told[21] == "  and 3 more near ties"
    (result,) = as_json("x", done)["results"]
    assert (result["passes"]["fast"]["num_ties"], len(result["passes"]["fast"]["ties"])) == (23, 23)


def test_each_precision_has_its_passes() -> None:
    assert [one.name for one in passes_of("fp32")] == ["exact", "fast"]
    assert [one.name for one in passes_of("bf16_autocast")] == ["exact", "fast", "own"]
    assert [one.name for one in reference_passes("bf16")] == ["exact", "start", "fast", "own"]
    assert [one.name for one in reference_passes("fp32")] == ["exact", "start", "fast"]
    for one in passes_of("bf16"):
        # Where later steps are compared in rounded numbers, every step begins from the same weights.
        assert one.is_held == (one.precision != "fp64")


def test_the_usual_world_is_what_the_axes_multiply_to() -> None:
    assert usual_world(ParallelConfig(tp=2, pp=2, dp_shard=3)) == 12
    assert usual_world(ParallelConfig()) == 2
    assert usual_world(ParallelConfig(tp=4)) == 4
    assert usual_world(ParallelConfig(ep=8)) == 8
    assert usual_world(ParallelConfig(ep=2, etp=2, tp=2, pp=2)) == 8


def test_an_axis_that_no_small_layout_has_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    run_file = read_run_file(RUNS / "dense_tiny.toml", ["parallel.tp=2", "parallel.pp=2"], world_size=16)
    monkeypatch.setattr(proof, "refusals", lambda _, sizes: ["no"] if sizes.tp > 1 else [])
    with pytest.raises(ConfigError, match="tp: above 1 on no layout of at most 8 ranks"):
        proof.plan_proof(run_file, 16)


def test_what_was_never_together_stands_above_the_table() -> None:
    plan = plan_of("dense_tiny.toml")
    sets = tuple(frozenset({"tp", f"axis{number:02}"}) for number in range(12))
    told = list(heading("x", proof.Plan(plan.run_file, plan.target, Cover((), (), sets), plan.narrowed)))
    assert "  axis00 x tp" in told
    assert "  and 4 more sets of axes" in told
    assert "never above 1 together: nothing" in list(heading("x", plan))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"world_size": 1}, "  -n = 1: one process has no layout to prove; -n 2 would fit"),
        ({"overrides": ["parallel.ep=1", "parallel.dp_shard=1"]}, "parallel.dp_shard=2 would fit"),
        ({"out": RUNS}, f'--out = "{RUNS}": is a folder, and must be a file; --out {RUNS}/proof.json would fit'),
        ({"world_size": 3}, "parallel.ep = 2: ep * etp = 2 must divide the 3 ranks"),
        ({"overrides": ["train.stps=1"]}, "train.stps: no such key; did you mean train.steps?"),
        ({"overrides": ["parallel.tp=2"]}, "parallel.tp = 2: must divide model.num_heads = 5"),
    ],
)
def test_mistakes_are_told_before_anything_is_started(arguments: dict[str, object], told: str) -> None:
    given = {"overrides": ["parallel.ep=1"] if arguments.get("world_size") == 1 else []} | arguments
    with pytest.raises(ConfigError) as refused:
        command(RUNS / "moe_tiny.toml", **given)  # type: ignore[arg-type]
    assert told in str(refused.value)
    assert not str(refused.value).startswith("world size")


def test_a_proof_that_is_stopped_says_so_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(proof, "prove", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        command(RUNS / "dense_tiny.toml", [], out=tmp_path / "answer.json")
    assert ended.value.code == 143
    assert "prove was stopped by SIGTERM: nothing was proved, and " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_records_are_of_numbers_alone() -> None:
    # What travels between processes is numpy's, so that no file descriptor of a shared tensor does.
    judge = proof.Judge(plan_of("moe_tiny.toml").narrowed.run_file, ("exact",))
    step = judge.one["exact"].steps[0]
    assert all(type(piece.values) is np.ndarray for piece in [*step.gradients.values(), *step.weights.values()])
    assert {"tokens", "targets", "embedding output", "layers.1.feedforward.part.router experts"} <= set(step.at_tokens)
