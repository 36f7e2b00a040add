"""What two runs hold at the end is compared wherever it lies: every number, copies too, moments as what they are of."""

from typing import Any

import numpy as np

from meshwright.launcher.proof.held import compare_bits, compare_held, compare_states
from meshwright.launcher.proof.record import Piece

WHOLE = np.arange(12.0).reshape(4, 3) - 5


def piece(begin: int, end: int, *, off: float = 0.0, whole: Any = WHOLE) -> Piece:
    values = whole[begin:end].copy()
    values[-1, -1] += off
    return Piece(whole.shape, (begin, 0), values)


def cut(name: str = "w", *, off: float = 0.0, whole: Any = WHOLE) -> list[dict[str, Piece]]:
    return [{name: piece(0, 1, whole=whole)}, {name: piece(1, 4, off=off, whole=whole)}]


def test_another_cut_of_the_same_numbers_is_the_same_and_one_that_is_off_is_named() -> None:
    before = [{"w": piece(0, 2)}, {"w": piece(2, 4)}]
    assert compare_held(before, cut(), norm=1.0) == ([], 0.0)
    told, worst = compare_held(before, cut(off=9e-9), norm=1.0)
    assert told == ["at the end: w: off by 1.5e-09 of its largest value, most on rank 1"]
    assert 1.49e-9 < worst < 1.51e-9
    copies = [{"w": piece(0, 4)}, {"w": piece(0, 4, off=1.0)}]
    assert compare_held(before, copies, norm=1.0)[0] != []
    assert compare_held(before, cut(off=np.nan), norm=1.0)[0] != []


def test_what_is_on_no_rank_or_in_one_run_only_is_told() -> None:
    before = [{"w": piece(0, 4)}]
    (told,) = compare_held(before, [{"w": piece(0, 2)}], norm=1.0)[0]
    assert told == "at the end: w: 6 of its numbers are on no rank, and 0 were on none of the unbroken run"
    assert compare_held(before, [{}], norm=1.0)[0] == ["at the end: w is held by the unbroken run only"]
    assert compare_held([{}], before, norm=1.0)[0] == ["at the end: w is held by the resumed run only"]
    (odd,) = compare_held(before, [{"w": piece(0, 3, whole=WHOLE[:3])}], norm=1.0)[0]
    assert "has the global shapes [(3, 3), (4, 3)]" in odd
    assert compare_bits(before, [{}]) == ["at the end: w is held by the unbroken run only"]
    assert compare_bits(before, [{"w": piece(0, 4, off=1e-15)}]) == ["at the end: w has other bits on rank 0"]
    assert compare_bits(before, before) == []
    zero, minus = ([{"w": Piece((1,), (0,), np.array([value]))}] for value in (0.0, -0.0))
    assert compare_bits(zero, minus) == ["at the end: w has other bits on rank 0"]
    narrow = [{"w": Piece((1,), (0,), np.zeros(1, np.float32))}]
    assert compare_bits(zero, narrow) == ["at the end: w has other bits on rank 0"]


def test_values_beside_tensors_are_compared_wherever_they_stand() -> None:
    state = {"step": 4, "norms": [0.5, 2.0], "changes": ["a"], "kernels": {"attention": "own"}}
    for other, told in (
        ({"step": 5}, "step is 5, not 4"),
        ({"norms": [0.5]}, "norms has 1 entries, not 2"),
        ({"norms": [0.5, 2.0 + 1e-8]}, "norms[1] is 2.00000001, not 2.0"),
        ({"norms": [0.5, np.nan]}, "norms[1] is nan, not 2.0"),
        ({"norms": None}, "norms is None, not [0.5, 2.0]"),
        ({"changes": ["b"]}, "changes[0] is 'b', not 'a'"),
        ({"kernels": {"attention": "torch"}}, "kernels.attention is 'torch', not 'own'"),
        ({"kernels": {}}, "kernels.attention is held by the unbroken run only"),
        ({"best": 1.0}, "best is held by the resumed run only"),
    ):
        assert compare_states(state, [state, state | other], 1e-9) == [f"at the end, rank 1: {told}"]
    rounded = state | {"norms": [0.5, 2.0 + 1e-12]}
    assert compare_states(state, [rounded], 1e-9) == []
    assert compare_states(state, [rounded], 0.0) == ["at the end, rank 0: norms[1] is 2.000000000001, not 2.0"]


def test_moments_that_are_zero_but_for_rounding_must_only_be_so_too() -> None:
    for name, size, measure in (
        ("optimizer.exp_avg.b", 1e-14, 1e-12),
        ("optimizer.exp_avg_sq.b", 1e-27, 1e-24),
        ("optimizer.momentum.b", 1e-14, 1e-12),
    ):
        rounding = size / np.abs(WHOLE).max() * WHOLE
        assert compare_held(cut(name, whole=rounding), cut(name, whole=-rounding), norm=1.0) == ([], 0.0)
        assert compare_held(cut(name, whole=rounding), cut(name, whole=-rounding), norm=1e-9)[0] != []
        assert compare_held(cut(name, whole=rounding), cut(name, whole=rounding, off=2 * measure), norm=1.0)[0] != []
    # A weight has no such measure.
    assert compare_held(cut(whole=1e-14 * WHOLE), cut(whole=-1e-14 * WHOLE), norm=1.0)[0] != []
