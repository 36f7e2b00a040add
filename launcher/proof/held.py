"""What two runs hold at the end, compared: weights, moments and buffers, rank by rank or wherever they lie.

    same layout       each rank with the same rank, bit for bit
    another layout    each piece with its box of the whole, which the other run's pieces make up; to 1e-9 of the
                      tensor's largest value
    state             what a checkpoint says beside tensors, on every rank: equal; on another layout floats to 1e-9

A gradient that is nowhere above 1e-12 of the norm is zero but for rounding (`compare.py`), and so are its moments: the
other run's must be so too, and nothing more is asked. exp_avg_sq is of squares.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from meshwright.launcher.proof.compare import (
    EXACT,
    NOTHING,
    by_name,
    largest,
    on_no_rank,
    same_bits,
    whole_of,
    worst_error,
)
from meshwright.launcher.proof.record import Piece

Held = dict[str, Piece]
"""What a rank holds, by the names that a checkpoint has."""
State = dict[str, Any]
"""What a checkpoint says beside tensors."""
_AT_THE_END = "at the end: "
_OF_GRADIENTS = ("optimizer.exp_avg.", "optimizer.momentum.")
_OF_SQUARES = "optimizer.exp_avg_sq."


def compare_bits(expected: Sequence[Held], found: Sequence[Held]) -> list[str]:
    """Return what a rank holds with other bits than the same rank of the other run."""
    differences = []
    for rank, (theirs, ours) in enumerate(zip(expected, found, strict=True)):
        for name in theirs | ours:
            if name not in ours or name not in theirs:
                differences.append(_AT_THE_END + _of_one_run(name, is_unbroken=name in theirs))
            elif not same_bits(ours[name].values, theirs[name].values):
                differences.append(f"{_AT_THE_END}{name} has other bits on rank {rank}")
    return differences


def compare_held(expected: Sequence[Held], found: Sequence[Held], *, norm: float) -> tuple[list[str], float]:
    """Return in what two layouts differ, and the largest error of a tensor; `norm` is the largest of a step."""
    differences, worst = [], 0.0
    theirs, ours = by_name(expected), by_name(found)
    for name in theirs | ours:
        if name not in ours or name not in theirs:
            differences.append(_AT_THE_END + _of_one_run(name, is_unbroken=name in theirs))
            continue
        shape, *others = sorted({piece.shape for _, piece in (*theirs[name], *ours[name])})
        if others:
            differences.append(f"{_AT_THE_END}{name}: has the global shapes {[shape, *others]}")
            continue
        missing, left_out = (on_no_rank(shape, [piece for _, piece in run[name]]) for run in (theirs, ours))
        if missing or left_out:
            numbers = f"{left_out} of its numbers are on no rank, and {missing} were on none of the unbroken run"
            differences.append(f"{_AT_THE_END}{name}: {numbers}")
            continue
        whole = whole_of(theirs[name])
        if max(largest(whole), *(largest(piece.values) for _, piece in ours[name])) <= _nothing(name, norm):
            continue
        error, rank = worst_error(whole, ours[name], largest)
        worst = max(worst, error)
        if not error <= EXACT:
            differences.append(f"{_AT_THE_END}{name}: off by {error:.2g} of its largest value, most on rank {rank}")
    return differences, worst


def _of_one_run(name: str, *, is_unbroken: bool) -> str:
    return f"{name} is held by the {'unbroken' if is_unbroken else 'resumed'} run only"


def compare_states(expected: State, found: Sequence[State], allowed: float) -> list[str]:
    """Return what ranks of a resumed run would say otherwise; floats may be off by `allowed` of the unbroken run's."""
    return [
        f"at the end, rank {rank}: {line}"
        for rank, state in enumerate(found)
        for line in _other_values("", expected, state, allowed)
    ]


def _other_values(name: str, theirs: Any, ours: Any, allowed: float) -> Iterator[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in theirs | ours:
            inner = f"{name}.{key}" if name else str(key)
            if key in theirs and key in ours:
                yield from _other_values(inner, theirs[key], ours[key], allowed)
            else:
                yield _of_one_run(inner, is_unbroken=key in theirs)
    elif isinstance(theirs, list) and isinstance(ours, list):
        if len(theirs) != len(ours):
            yield f"{name} has {len(ours)} entries, not {len(theirs)}"
            return
        for at, (one, other) in enumerate(zip(theirs, ours, strict=True)):
            yield from _other_values(f"{name}[{at}]", one, other, allowed)
    elif isinstance(theirs, float) and isinstance(ours, float):
        if not abs(ours - theirs) <= allowed * abs(theirs):
            yield f"{name} is {ours!r}, not {theirs!r}"
    elif theirs != ours:
        yield f"{name} is {ours!r}, not {theirs!r}"


def _nothing(name: str, norm: float) -> float:
    """Return up to where a tensor is zero but for rounding."""
    if name.startswith(_OF_SQUARES):
        return (NOTHING * norm) ** 2
    return NOTHING * norm if name.startswith(_OF_GRADIENTS) else 0.0
