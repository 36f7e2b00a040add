"""Every kind of difference is found, named, and told in the order of a step; rounding is not one."""

from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pytest

from meshwright.launcher.proof.compare import (
    Tie,
    Verdict,
    compare_checkpoint,
    compare_exactly,
    compare_fast,
    errors_of,
)
from meshwright.launcher.proof.own_precision import (
    compare_computed,
    compare_own,
    compare_sums,
    masters_after,
    other_than_masters,
)
from meshwright.launcher.proof.record import AtTokens, Piece, RankRecord, StepRecord

SAMPLE, POSITION = np.repeat([0, 1], 3), np.tile([0, 1, 2], 2)


def at_tokens(values: object, rows: slice = slice(None)) -> AtTokens:
    return AtTokens(SAMPLE[rows], POSITION[rows], np.asarray(values)[rows])


def record(rows: slice = slice(None), half: slice = slice(0, 4)) -> RankRecord:
    """Return what a rank with these tokens and these rows of the weights has; by default all."""
    values = np.arange(12.0).reshape(4, 3) + 1
    piece = Piece((4, 3), (half.start, 0), values[half])
    step = StepRecord(
        loss=2.0,
        norm=5.0,
        sums={"layers.0.load": np.array([3.0, 9.0]), "layers.0.balance": np.array([1.5])},
        at_tokens={
            "tokens": at_tokens([5, 6, 7, 8, 9, 1], rows),
            "layers.0.mixer output": at_tokens(np.arange(12.0).reshape(6, 2), rows),
            "layers.0.router experts": at_tokens([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2], [1, 3]], rows),
            "layers.0.router margin": at_tokens([0.5, 1e-7, 0.5, 0.5, 0.5, 0.5], rows),
        },
        gradients={"a": piece, "b": Piece((2,), (0,), np.array([1.0, -1.0])), "zero": Piece((1,), (0,), np.zeros(1))},
        weights={"a": Piece((4, 3), (half.start, 0), values[half].copy())},
        evaluation=(2.5, 40),
    )
    return RankRecord([deepcopy(step), deepcopy(step)], {"a": piece})


def two_ranks() -> list[RankRecord]:
    return [record(slice(0, 3), slice(0, 2)), record(slice(3, 6), slice(2, 4))]


def first(verdict: Verdict) -> tuple[str, str, int]:
    difference = verdict.differences[0]
    return difference.what, difference.name, difference.step


def test_ranks_that_hold_it_all_together_are_the_same() -> None:
    assert compare_exactly(record(), two_ranks()) == Verdict([])


def test_a_rank_may_have_no_token_of_a_layer_that_only_some_go_through() -> None:
    ranks = two_ranks()
    for number, step in enumerate(record().steps):
        for name in ("layers.0.mixer output", "layers.0.router experts", "layers.0.router margin"):
            everything = step.at_tokens[name]
            ranks[0].steps[number].at_tokens[name] = AtTokens(SAMPLE[:0], POSITION[:0], everything.values[:0])
            ranks[1].steps[number].at_tokens[name] = everything
    assert compare_exactly(record(), ranks) == Verdict([])
    assert compare_fast(record(), record(), ranks) == Verdict([])


def piece(values: object) -> Piece:
    array = np.asarray(values, np.float64)
    return Piece(array.shape, (0,) * array.ndim, array)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["sums", "gradients", "weights", "at_tokens", "loss", "norm"])
def test_what_is_no_number_on_one_rank_is_a_difference(kind: str, rank: int) -> None:
    ranks = two_ranks()
    step = ranks[rank].steps[1]
    if kind == "sums":
        step.sums["layers.0.balance"] = np.array([np.nan])
    elif kind == "gradients":
        step.gradients["zero"] = piece([np.nan])  # where one process has a zero
    elif kind == "weights":
        step.weights["a"].values[0, 0] = np.nan
    elif kind == "at_tokens":
        step.at_tokens["layers.0.mixer output"].values[0] = np.nan
    else:
        setattr(step, kind, np.nan)
    verdict = compare_exactly(record(), ranks)
    assert first(verdict)[2] == 1
    assert len(verdict.differences) == 1


def test_what_one_side_alone_has_is_a_difference() -> None:
    ranks = two_ranks()
    del ranks[1].steps[0].sums["layers.0.balance"]
    ranks[0].steps[0].sums["layers.1.balance"] = np.array([1.0])
    ranks[0].steps[0].gradients["b2"] = piece([1.0])
    ranks[1].steps[0].weights["b2"] = piece([1.0])
    ranks[1].steps[0].evaluation = None
    found = [str(each) for each in compare_exactly(record(), ranks).differences]
    assert found == [
        "step 1, sum of layers.0.balance: off by inf",
        "step 1, sum of layers.1.balance: one process has none",
        "step 1, gradient of b2: one process has none",
        "step 1, weight of b2: one process has none",
        "step 1, evaluation: rank 1 evaluates, or one process does, and not both",
    ]


def edit(path: str) -> Callable[[RankRecord], None]:
    """Return a change to the second step of a rank's record."""
    kind, _, name = path.partition("/")

    def change(rank: RankRecord) -> None:
        step = rank.steps[1]
        if kind == "at_tokens":
            step.at_tokens[name].values[0] += 1
        elif kind == "sums":
            step.sums[name] += 1
        elif kind == "evaluation":
            loss, tokens = step.evaluation or (0.0, 0)
            step.evaluation = (loss * (1 + 1e-6), tokens) if name == "loss" else (loss, tokens + 1)
        elif kind in ("gradients", "weights"):
            step_piece = getattr(step, kind)[name]
            getattr(step, kind)[name] = Piece(step_piece.shape, step_piece.offset, step_piece.values + 1e-6)
        else:
            setattr(step, kind, getattr(step, kind) * (1 + 1e-6))

    return change


@pytest.mark.parametrize(
    ("path", "what", "name"),
    [
        ("at_tokens/tokens", "tokens", ""),
        ("at_tokens/layers.0.mixer output", "output", "layers.0.mixer"),
        ("at_tokens/layers.0.router experts", "experts", "layers.0.router"),
        ("loss", "loss", ""),
        ("norm", "norm", ""),
        ("sums/layers.0.load", "sum", "layers.0.load"),
        ("sums/layers.0.balance", "sum", "layers.0.balance"),
        ("gradients/a", "gradient", "a"),
        ("gradients/zero", "gradient", "zero"),
        ("weights/a", "weight", "a"),
        ("evaluation/loss", "evaluation", ""),
        ("evaluation/tokens", "evaluation", ""),
    ],
)
def test_each_quantity_is_compared_on_the_ranks_that_have_it(path: str, what: str, name: str) -> None:
    ranks = two_ranks()
    edit(path)(ranks[1])
    verdict = compare_exactly(record(), ranks)
    assert first(verdict) == (what, name, 1)
    assert len(verdict.differences) == 1


def test_the_first_difference_is_the_first_in_the_step() -> None:
    ranks = two_ranks()
    for path in ("weights/a", "norm", "gradients/a", "gradients/b", "loss", "at_tokens/layers.0.mixer output"):
        edit(path)(ranks[0])
    verdict = compare_exactly(record(), ranks)
    assert [difference.what for difference in verdict.differences] == [
        "output", "loss", "gradient", "gradient", "norm", "weight",
    ]  # fmt: skip
    assert [d.name for d in verdict.differences if d.what == "gradient"] == ["b", "a"]  # as the backward comes to them


def test_rounding_is_no_difference_and_its_size_is_told() -> None:
    ranks = two_ranks()
    piece = ranks[0].steps[0].gradients["a"]
    ranks[0].steps[0].gradients["a"] = Piece(piece.shape, piece.offset, piece.values + 6e-12)
    verdict = compare_exactly(record(), ranks)
    assert verdict.differences == []
    assert verdict.worst == pytest.approx(5e-13, rel=1e-3)  # of the largest value, 12


def test_a_gradient_that_is_rounding_alone_is_zero() -> None:
    one, ranks = record(), two_ranks()
    one.steps[0].gradients["zero"] = Piece((1,), (0,), np.array([3e-17]))
    ranks[0].steps[0].gradients["zero"] = Piece((1,), (0,), np.array([-1e-16]))
    assert compare_exactly(one, ranks).differences == []


def test_what_no_rank_holds_is_missed() -> None:
    verdict = compare_exactly(record(), two_ranks()[:1])
    notes = {(d.what, d.name): d.note for d in verdict.differences if d.step == 0}
    assert notes["gradient", "a"] == "no rank has 6 of its 12 numbers"
    assert notes["tokens", ""] == "3 of 6 tokens are on no rank"
    assert notes["output", "layers.0.mixer"] == "3 of 6 tokens are on no rank"


def test_a_token_of_another_step_is_told() -> None:
    ranks = two_ranks()
    ranks[1].steps[0].at_tokens["tokens"].sample[:] = 7
    assert compare_exactly(record(), ranks).differences[0].note == "rank 1 has 3 tokens that are none of it"


def test_a_number_that_is_none_is_a_difference() -> None:
    ranks = two_ranks()
    ranks[1].steps[0].gradients["a"].values[0, 0] = np.nan
    ranks[0].steps[0].loss = np.nan
    found = [(d.what, d.name) for d in compare_exactly(record(), ranks).differences if d.step == 0]
    assert found == [("loss", ""), ("gradient", "a")]


def test_fp32_is_held_to_the_norm_and_not_to_the_weights() -> None:
    ranks = two_ranks()
    edit("weights/a")(ranks[0])
    piece = ranks[0].steps[0].gradients["a"]
    off = np.zeros_like(piece.values)
    off[0, 0] = 1e-5 * np.linalg.norm(np.arange(1.0, 13.0))
    ranks[0].steps[0].gradients["a"] = Piece(piece.shape, piece.offset, piece.values + 0.9 * off)
    assert compare_fast(record(), record(), ranks).differences == []
    ranks[0].steps[0].gradients["a"] = Piece(piece.shape, piece.offset, piece.values + 1.1 * off)
    assert first(compare_fast(record(), record(), ranks)) == ("gradient", "a", 0)


def test_in_fp32_four_times_what_one_process_is_off_by_is_allowed_up_to_an_end() -> None:
    def off(of_one: float, of_ranks: float) -> list[str]:
        one = with_error(of_one, [record()])[0]
        return [d.name for d in compare_fast(record(), one, with_error(of_one + of_ranks, two_ranks())).differences]

    assert off(1e-6, 0.9e-5) == []
    assert off(1e-6, 1.1e-5) == ["b", "a", "b", "a"]
    assert off(1e-5, 3.9e-5) == []
    assert off(1e-5, 4.1e-5) == ["b", "a", "b", "a"]
    assert off(1e-3, 0.9e-4) == []
    assert off(1e-3, 1.1e-4) == ["b", "a", "b", "a"]


def test_in_fp32_a_near_tie_may_go_either_way_and_is_listed() -> None:
    ranks = two_ranks()
    ranks[0].steps[0].at_tokens["layers.0.router experts"].values[1] = [1, 3]  # where the margin is 1e-7
    verdict = compare_fast(record(), record(), ranks)
    assert (verdict.differences, verdict.ties) == ([], [Tie(0, "layers.0.router", 0, 1, 1e-7)])
    assert first(compare_exactly(record(), ranks)) == ("experts", "layers.0.router", 0)
    ranks[0].steps[0].at_tokens["layers.0.router experts"].values[0] = [0, 3]
    assert first(compare_fast(record(), record(), ranks)) == ("experts", "layers.0.router", 0)


def test_the_order_of_a_tokens_experts_is_no_difference() -> None:
    ranks = two_ranks()
    ranks[0].steps[0].at_tokens["layers.0.router experts"].values[0] = [1, 0]
    assert compare_exactly(record(), ranks).differences == []


def test_a_checkpoint_is_compared_bit_for_bit() -> None:
    ranks, shapes = two_ranks(), {"a": (4, 3)}
    assert compare_checkpoint(record(), ranks, shapes).differences == []
    ranks[1].held["a"].values[0, 0] += 1e-12
    assert compare_checkpoint(record(), ranks, shapes).differences[0].note == "rank 1 holds other numbers"


def test_a_checkpoint_must_hold_what_the_run_file_says_and_nothing_else() -> None:
    def told(loaded: RankRecord, ranks: list[RankRecord], **shapes: tuple[int, ...]) -> list[tuple[str, str]]:
        return [(found.name, found.note) for found in compare_checkpoint(loaded, ranks, shapes).differences]

    ranks = two_ranks()
    missing = [("optimizer.exp_avg.a", "is not in it")]
    assert told(record(), ranks, **{"a": (4, 3), "optimizer.exp_avg.a": (4, 3)}) == missing
    assert told(record(), ranks[:1], a=(4, 3)) == [("a", "is not of shape (4, 3) in what the ranks saved")]
    assert told(record(), ranks, a=(3, 4)) == [("a", "is not of shape (3, 4) in what the ranks saved")]
    assert told(record(), ranks) == [("a", "is in it, and no part of the run")]


def test_what_is_computed_with_is_held_against_the_masters_as_they_are_rounded() -> None:
    ranks = two_ranks()
    for rank in ranks:
        rank.steps[1].weights["a"].values[:] += 2.0**-12  # 1 + 2^-12 is 1 in bf16
        rank.computed["a"] = Piece((4, 3), (0, 0), np.arange(12.0).reshape(4, 3) + 1)
    verdict = Verdict([])
    compare_computed(verdict, ranks, "bf16")
    assert [str(found) for found in verdict.differences] == [
        "step 2, weight: the update moved none, so that nothing was shown"
    ]
    ranks[1].steps[1].weights["a"].values[0, 0] += 1.0
    verdict = Verdict([])
    compare_computed(verdict, ranks, "bf16")
    assert [str(found) for found in verdict.differences] == [
        "step 2, weight of a: rank 0 goes on with other numbers than its masters"
    ]
    for rank in ranks:
        rank.steps[1].weights["a"].values[:] = np.round(rank.steps[1].weights["a"].values)
    verdict = Verdict([])
    compare_computed(verdict, ranks, "bf16")
    assert "step 2, weight: the masters hold no more than bf16 does" in map(str, verdict.differences)
    ranks[0].computed["a"].values[2, 0] += 1.0
    ranks[1].computed.clear()
    assert list(other_than_masters(ranks, masters_after(ranks, -1, "bf16"))) == []
    ranks[0].computed.clear()
    assert list(other_than_masters(ranks, masters_after(ranks, -1, "bf16"))) == [("a", "no rank has it")]


def test_a_weight_that_rounding_alone_moved_may_be_off_by_a_few_learning_rates() -> None:
    def told(gradient: float, off: float) -> list[str]:
        one, other = record(), record()
        for each in (one, other):
            for step in each.steps:
                step.learning_rate = 1e-3
                step.gradients["zero"] = piece([gradient])
                step.weights["zero"] = piece([1e-3])
        other.steps[1].weights["zero"] = piece([1e-3 + off])
        return [str(found) for found in compare_exactly(one, [other]).differences]

    assert told(1e-14, 3e-3) == []
    assert told(1e-14, 5e-3) != []
    assert told(1e-3, 3e-3) != []


def test_a_sum_that_holds_no_more_than_bf16_is_told() -> None:
    def told(values: np.ndarray, summands: int, exact: float = 1.0) -> list[str]:
        ranks, verdict, one = two_ranks(), Verdict([]), record()
        for step in one.steps:
            step.gradients["w"] = piece(np.full((64, 2), exact))
        for rank, half in zip(ranks, np.split(values, 2), strict=True):
            for step in rank.steps:
                step.gradients = {"w": Piece((64, 2), (0, 0), half)}
        compare_sums(verdict, one, ranks, summands)
        return [str(found) for found in verdict.differences]

    of_bf16 = np.tile([1.0, 1.5], (64, 1)).astype(np.float32)
    assert told(of_bf16, 2) == ["step 2, gradient of w: the sum holds no more than bf16 does"]
    assert told(of_bf16, 1) == []  # one product's result
    assert told(of_bf16, 2, exact=1e-13) == []  # zero but for rounding, the norm is 5
    of_bf16[63, 1] += 2.0**-12
    assert told(of_bf16, 2) == []


def with_error(size: float, records: list[RankRecord]) -> list[RankRecord]:
    for rank in records:
        for step in rank.steps:
            for name, piece in step.gradients.items():
                step.gradients[name] = Piece(piece.shape, piece.offset, piece.values * (1 + size))
    return records


def test_the_own_precision_may_be_so_many_times_as_far_off_as_one_process() -> None:
    exact, one = record(), with_error(1e-3, [record()])[0]
    assert compare_own(exact, one, with_error(1.5e-3, two_ranks())).worst == pytest.approx(1.5)
    verdict = compare_own(exact, one, with_error(4e-3, two_ranks()))
    assert verdict.worst == pytest.approx(4.0)
    assert verdict.differences[0].note == "4 times as far from fp64 as one process"
    assert {name for _, name, error in errors_of(exact, [one]) if error > 0} == {"a", "b"}
