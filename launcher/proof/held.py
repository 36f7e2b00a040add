"""What two runs hold at the end, compared: weights, moments and buffers, rank by rank or wherever they lie.

    same layout       each rank with the same rank, bit for bit
    another layout    each piece with its box of the whole, which the other run's pieces make up; to 1e-9 of the
                      tensor's largest value

A gradient that is nowhere above 1e-12 of the norm is zero but for rounding (`compare.py`), and so are its moments: the
other run's must be so too, and nothing more is asked. exp_avg_sq is of squares.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from meshwright.launcher.proof.compare import EXACT, NOTHING, box_of, by_name, largest, worst_error
from meshwright.launcher.proof.record import Array, Piece

Held = dict[str, Piece]
"""What a rank holds, by the names that a checkpoint has."""
_AT_THE_END = "at the end: "
_OF_GRADIENTS = ("optimizer.exp_avg.", "optimizer.momentum.")
_OF_SQUARES = "optimizer.exp_avg_sq."


def compare_bits(expected: Sequence[Held], found: Sequence[Held]) -> list[str]:
    """Return what a rank holds with other bits than the same rank of the other run."""
    differences = []
    for rank, (theirs, ours) in enumerate(zip(expected, found, strict=True)):
        for name in theirs | ours:
            if name not in ours or name not in theirs:
                differences.append(_AT_THE_END + _of_one_run(name, theirs))
            elif not np.array_equal(ours[name].values, theirs[name].values):
                differences.append(f"{_AT_THE_END}{name} has other bits on rank {rank}")
    return differences


def compare_held(expected: Sequence[Held], found: Sequence[Held], *, norm: float) -> tuple[list[str], float]:
    """Return in what two layouts differ, and the largest error of a tensor; `norm` is the largest of a step."""
    differences, worst = [], 0.0
    theirs, ours = by_name(expected), by_name(found)
    for name in theirs | ours:
        if name not in ours or name not in theirs:
            differences.append(_AT_THE_END + _of_one_run(name, theirs))
            continue
        whole, missing = _whole(theirs[name])
        left_out = _whole(ours[name])[1]
        shapes = {piece.shape for _, piece in (*theirs[name], *ours[name])}
        if len(shapes) > 1 or missing or left_out:
            numbers = f"{left_out} of its numbers are on no rank, and {missing} were on none of the unbroken run"
            odd = f"has the global shapes {sorted(shapes)}" if len(shapes) > 1 else numbers
            differences.append(f"{_AT_THE_END}{name}: {odd}")
            continue
        if max(largest(whole), *(largest(piece.values) for _, piece in ours[name])) <= _nothing(name, norm):
            continue
        error, rank = worst_error(whole, ours[name], largest)
        worst = max(worst, error)
        if not error <= EXACT:
            differences.append(f"{_AT_THE_END}{name}: off by {error:.2g} of its largest value, most on rank {rank}")
    return differences, worst


def _of_one_run(name: str, theirs: dict[str, Any]) -> str:
    return f"{name} is held by the {'unbroken' if name in theirs else 'resumed'} run only"


def _whole(pieces: Sequence[tuple[int, Piece]]) -> tuple[Array, int]:
    """Return what pieces make up together, in fp64, and how many numbers are in none of them."""
    shape = pieces[0][1].shape
    whole, covered = np.zeros(shape), np.zeros(shape, bool)
    for _, piece in pieces:
        if piece.shape == shape:
            whole[box_of(piece)], covered[box_of(piece)] = piece.values, True
    return whole, int((~covered).sum())


def _nothing(name: str, norm: float) -> float:
    """Return up to where a tensor is zero but for rounding."""
    if name.startswith(_OF_SQUARES):
        return (NOTHING * norm) ** 2
    return NOTHING * norm if name.startswith(_OF_GRADIENTS) else 0.0
