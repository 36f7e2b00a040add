"""What differs between the records of a layout's ranks and those of one process, and by how much.

    exact    fp64; 1e-9 of each tensor's largest value; tokens and experts equal       everything that is recorded
    fast     fp32; 1e-5 of each tensor's norm, or four times one process' own error    loss, norm, gradients, experts
    own      a few times the error that one process has in the same precision          gradients, loss, norm

Every rank's piece is held against the same box of what one process has, copies too, and together the pieces must
leave nothing out. A gradient that is nowhere above 1e-12 of the norm is zero but for rounding (a bias that cancels
out): the ranks' must be so too, and nothing more is asked. In fp32 a tensor's norm counts as at least 5e-3 of the whole
norm: of terms that nearly cancel, what is left is as far off as they are, not as it is itself. Where a model makes much
of rounding (attention whose logits are large), one process is off from fp64 by as much: what it is off by four times is
allowed, up to 1e-4.

Differences are told in the order of a step: what the model saw, the layers' outputs and choices from the first to the
last, the loss, gradients from the last to the first, the norm, the weights. The first one is where to look.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import numpy as np

from meshwright.launcher.proof.passes import ROUNDING
from meshwright.launcher.proof.record import Array, AtTokens, Piece, RankRecord, StepRecord

EXACT, FAST = 1e-9, 1e-5
NOTHING = 1e-12
SMALL = 5e-3
"""In fp32: up to this part of the norm a gradient is held to FAST of this, 5e-8 of the norm.

Gradients that are zero but for rounding were off by up to 1.4e-8 of it (samples of one token); none else was by 1e-6 of
its own norm, down to 1e-4 of the whole.
"""
TIMES, FARTHEST = 4.0, 1e-4
"""In fp32: how many times as far off as one process a gradient may be, as in `own_precision.py`, and where that ends.

Above FARTHEST one process' error tells of another choice that it made, no longer of rounding alone.
"""
Size = Callable[[Array], float]


@dataclass(frozen=True)
class Difference:
    """One quantity that is not as it is on one process."""

    what: str
    """tokens, targets, output, experts, loss, sum, gradient, norm, weight, evaluation, checkpoint."""
    name: str
    """Of the tensor, the layer or the sum; "" where there is but one."""
    step: int
    error: float
    """In units of the tensor's largest value, or of its norm; of experts and ids, how many differ."""
    note: str = ""

    def __str__(self) -> str:
        """Return the difference as part of a sentence."""
        by = self.note or f"off by {self.error:.2g}"
        return f"step {self.step + 1}, {self.what}{' of ' if self.name else ''}{self.name}: {by}"


@dataclass(frozen=True)
class Tie:
    """A token whose experts differ because rounding decides between them."""

    step: int
    layer: str
    sample: int
    position: int
    margin: float
    """Of one process: by how much the last expert that it chose won."""

    def __str__(self) -> str:
        """Return the tie as part of a sentence."""
        place = f"step {self.step + 1}, {self.layer}, sample {self.sample}, position {self.position}"
        return f"{place}, margin {self.margin:.1e}"


@dataclass
class Verdict:
    """What came of a comparison."""

    differences: list[Difference]
    worst: float = 0.0
    """The largest error of a tensor, also where it is allowed."""
    ties: list[Tie] = field(default_factory=list)

    def miss(self, name: str, note: str, *, what: str = "gradient", step: int = 0, error: float = np.nan) -> None:
        """Add a difference that is told in words."""
        self.differences.append(Difference(what, name, step, error, note))


def compare_exactly(one: RankRecord, ranks: Sequence[RankRecord]) -> Verdict:
    """Compare everything, in fp64."""
    verdict = Verdict([])
    for step in range(len(one.steps)):
        _compare_tokens(verdict, one, ranks, step)
        _compare_loss(verdict, one, ranks, step, EXACT)
        _compare_tensors(verdict, one, ranks, step, "gradients", largest, EXACT)
        _judge(verdict, "norm", "", step, _worst(ranks, step, "norm", one), EXACT)
        _compare_tensors(verdict, one, ranks, step, "weights", largest, EXACT)
        _compare_evaluation(verdict, one, ranks, step)
    return verdict


def compare_fast(exact: RankRecord, one: RankRecord, ranks: Sequence[RankRecord]) -> Verdict:
    """Compare what fp32 can be held to; `exact` is one process in fp64, from the same weights in every step."""
    verdict = Verdict([])
    for step in range(len(one.steps)):
        allowed = _rounding_of(exact.steps[step], one.steps[step])
        _compare_experts(verdict, one, ranks, step, ROUNDING)
        _compare_loss(verdict, one, ranks, step, FAST)
        _compare_tensors(verdict, one, ranks, step, "gradients", norm, FAST, allowed)
        _judge(verdict, "norm", "", step, _worst(ranks, step, "norm", one), allowed["norm"])
    return verdict


def _rounding_of(exact: StepRecord, one: StepRecord) -> dict[str, float]:
    """Return what each gradient may be off by because one process is off from fp64, and the norm; FAST at least."""
    errors = {
        name: worst_error(exact.gradients[name].values, [(0, piece)], norm, unit=SMALL * exact.norm)[0]
        for name, piece in one.gradients.items()
        if name in exact.gradients
    }
    errors["norm"] = _relative(one.norm, exact.norm)
    return {name: max(FAST, min(TIMES * error, FARTHEST)) for name, error in errors.items()}


def compare_checkpoint(
    loaded: RankRecord, ranks: Sequence[RankRecord], expected: Mapping[str, tuple[int, ...]]
) -> Verdict:
    """Compare what one process loaded with what the ranks saved, bit for bit; all that is `expected` must be there."""
    verdict = Verdict([])
    for name, shape in expected.items():
        pieces = [record.held[name] for record in ranks if name in record.held]
        if name not in loaded.held or any(held.shape != shape for held in pieces) or on_no_rank(shape, pieces):
            where = "is not in it" if name not in loaded.held else f"is not of shape {shape} in what the ranks saved"
            verdict.miss(name, where, what="checkpoint")
    for name in {name: None for record in ranks for name in record.held}:
        if name not in expected:
            verdict.miss(name, "is in it, and no part of the run", what="checkpoint")
            continue
        for rank, record in enumerate(ranks):
            piece, whole = record.held.get(name), loaded.held.get(name)
            if whole is None or piece is None:
                continue
            if piece.shape != whole.shape:  # told above
                continue
            if not same_bits(piece.values, whole.values[box_of(piece)]):
                error = float(np.abs(piece.values - whole.values[box_of(piece)]).max())
                verdict.miss(name, f"rank {rank} holds other numbers", what="checkpoint", error=error)
    return verdict


def errors_of(one: RankRecord, ranks: Sequence[RankRecord]) -> Iterator[tuple[int, str, float]]:
    """Yield (step, tensor, error in units of its norm) of every gradient, of the loss and of the norm."""
    for step, theirs in enumerate(one.steps):
        yield step, "loss", _worst(ranks, step, "loss", one)
        yield step, "norm", _worst(ranks, step, "norm", one)
        for name, pieces in by_name(record.steps[step].gradients for record in ranks).items():
            if name in theirs.gradients and not is_nothing(theirs, name):
                yield step, name, worst_error(theirs.gradients[name].values, pieces, norm)[0]


def largest(values: Array) -> float:
    """Return the largest absolute value; 0 of nothing, infinite where one is no number."""
    return _finite(float(np.abs(values).max(initial=0.0)))


def norm(values: Array) -> float:
    """Return the 2-norm, in fp64; infinite where one is no number."""
    return _finite(float(np.linalg.norm(values.astype(np.float64).reshape(-1))))


def _finite(size: float) -> float:
    """Return a size that compares: of nan, `max` and every `<` would say that it is small."""
    return size if np.isfinite(size) else np.inf


def is_nothing(step: StepRecord, name: str) -> bool:
    """Say whether one process has no gradient of a tensor in a step but rounding."""
    return name not in step.gradients or largest(step.gradients[name].values) <= NOTHING * step.norm


def same_bits(one: Array, other: Array) -> bool:
    """Say whether numbers of one type are bit for bit the same, and numbers: nan shows nothing."""
    return one.dtype == other.dtype and np.array_equal(one, other) and one.tobytes() == other.tobytes()


def box_of(piece: Piece) -> tuple[slice, ...]:
    """Return where a piece lies in its global tensor."""
    return tuple(slice(begin, begin + n) for begin, n in zip(piece.offset, piece.values.shape, strict=True))


def on_no_rank(shape: tuple[int, ...], pieces: Iterable[Piece]) -> int:
    """Return how many numbers of a tensor of this shape are in none of its pieces."""
    covered = np.zeros(shape, bool)
    for piece in pieces:
        covered[box_of(piece)] = True
    return int((~covered).sum())


def worst_error(
    whole: Array, pieces: Sequence[tuple[int, Piece]], size: Size, *, unit: float = 0.0
) -> tuple[float, int]:
    """Return the error of the worst complete set of pieces, in units of the whole's size, and whose is the worst piece.

    Of copies of a piece the worst one counts. `unit` is what the error is told in where the whole is smaller.
    """
    of_place: dict[tuple[int, ...], tuple[float, int]] = {}
    for rank, piece in pieces:
        error = size(piece.values.astype(np.float64) - whole[box_of(piece)])
        of_place[piece.offset] = max(of_place.get(piece.offset, (-1.0, rank)), (error, rank))
    if not of_place:
        return 0.0, 0
    together = size(np.array([error for error, _ in of_place.values()]))
    return _relative_to(together, max(size(whole), unit)), max(of_place.values())[1]


def _compare_tensors(
    verdict: Verdict,
    one: RankRecord,
    ranks: Sequence[RankRecord],
    step: int,
    kind: str,
    size: Size,
    allowed: float,
    own: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Compare each tensor of a kind; `own` is what some of them may be off by, `allowed` the others."""
    wholes: dict[str, Piece] = getattr(one.steps[step], kind)
    what = kind.removesuffix("s")
    held = by_name(getattr(record.steps[step], kind) for record in ranks)
    nothing = NOTHING * one.steps[step].norm if what == "gradient" else 0.0
    small = SMALL * one.steps[step].norm if size is norm else 0.0
    for name in reversed(wholes) if what == "gradient" else wholes:
        whole, pieces = wholes[name], held.get(name, [])
        if odd := [piece.shape for _, piece in pieces if piece.shape != whole.shape]:
            verdict.miss(name, f"has the global shape {odd[0]}, not {whole.shape}", what=what, step=step)
            continue
        if missing := on_no_rank(whole.shape, [piece for _, piece in pieces]):
            verdict.miss(name, f"no rank has {missing} of its {whole.values.size} numbers", what=what, step=step)
        if max([largest(whole.values), *(largest(piece.values) for _, piece in pieces)]) <= nothing:
            continue
        unit = small
        if what == "weight" and all(is_nothing(done, name) for done in one.steps[: step + 1]):
            # Rounding alone moved it, which Adam makes steps of: they are as large as the learning rate at most.
            unit = 2 * sum(done.learning_rate for done in one.steps[: step + 1]) / allowed
        error, rank = worst_error(whole.values, pieces, size, unit=unit)
        note = f"off by {error:.2g} of its {'largest value' if size is largest else 'norm'}, most on rank {rank}"
        _judge(verdict, what, name, step, error, own.get(name, allowed), note)
    _tell_extra(verdict, what, step, wholes, [getattr(record.steps[step], kind) for record in ranks])


def _compare_loss(verdict: Verdict, one: RankRecord, ranks: Sequence[RankRecord], step: int, allowed: float) -> None:
    _judge(verdict, "loss", "", step, _worst(ranks, step, "loss", one), allowed)
    for name, value in one.steps[step].sums.items():
        theirs = [record.steps[step].sums.get(name) for record in ranks]
        off = max(np.inf if each is None else largest(each - value) for each in theirs)
        # Loads are counts of tokens.
        _judge(verdict, "sum", name, step, _relative_to(off, largest(value)), 0.0 if name.endswith("load") else allowed)
    _tell_extra(verdict, "sum", step, one.steps[step].sums, [record.steps[step].sums for record in ranks])


def _tell_extra(
    verdict: Verdict, what: str, step: int, one: Mapping[str, object], ranks: Sequence[Mapping[str, object]]
) -> None:
    for name in dict.fromkeys(name for of_rank in ranks for name in of_rank if name not in one):
        verdict.miss(name, "one process has none", what=what, step=step)


def _compare_evaluation(verdict: Verdict, one: RankRecord, ranks: Sequence[RankRecord], step: int) -> None:
    for rank, record in enumerate(ranks):
        ours, theirs = record.steps[step].evaluation, one.steps[step].evaluation
        if ours is None or theirs is None:
            if ours is not theirs:
                verdict.miss(
                    "", f"rank {rank} evaluates, or one process does, and not both", what="evaluation", step=step
                )
            continue
        if ours[1] != theirs[1]:
            verdict.miss("", f"on {ours[1]} tokens, not {theirs[1]}, on rank {rank}", what="evaluation", step=step)
        _judge(verdict, "evaluation", "", step, _relative(ours[0], theirs[0]), EXACT)


def _compare_tokens(verdict: Verdict, one: RankRecord, ranks: Sequence[RankRecord], step: int) -> None:
    """Compare ids, outputs and choices, in the order in which one process came to them."""
    for name, theirs in one.steps[step].at_tokens.items():
        layer, _, what = name.rpartition(" ")
        if what == "experts":
            _compare_experts(verdict, one, ranks, step, 0.0, only=layer)
        elif what != "margin":
            worst = 0.0
            for ours, rows in _matched(verdict, what, layer, step, theirs, ranks, name):
                off = np.abs(ours.values.astype(np.float64) - theirs.values[rows])
                worst = max(worst, off.max(initial=0.0) if np.isfinite(off).all() else np.inf)
            size = largest(theirs.values) if what == "output" else 1.0
            _judge(verdict, what, layer, step, _relative_to(worst, size), EXACT)


def _compare_experts(
    verdict: Verdict, one: RankRecord, ranks: Sequence[RankRecord], step: int, tie: float, only: str = ""
) -> None:
    """Compare the sets of experts of each token; where one process' margin is below `tie`, they may differ."""
    for name, theirs in one.steps[step].at_tokens.items():
        layer, _, what = name.rpartition(" ")
        if what != "experts" or (only and layer != only):
            continue
        wrong, margins = 0, one.steps[step].at_tokens[f"{layer} margin"].values
        for ours, rows in _matched(verdict, what, layer, step, theirs, ranks, name):
            differ = (np.sort(ours.values, 1) != np.sort(theirs.values[rows], 1)).any(1)
            near = margins[rows] < tie
            for row in rows[differ & near].tolist():
                place = int(theirs.sample[row]), int(theirs.position[row])
                verdict.ties.append(Tie(step, layer, *place, float(margins[row])))
            wrong += int((differ & ~near).sum())
        if wrong:
            verdict.miss(layer, f"{wrong} tokens go to other experts", what=what, step=step, error=float(wrong))


def _matched(
    verdict: Verdict, what: str, layer: str, step: int, theirs: AtTokens, ranks: Sequence[RankRecord], name: str
) -> Iterator[tuple[AtTokens, Array]]:
    """Yield each rank's rows, and where one process has the same tokens; tell what is missing or too much."""
    row_of = {at: row for row, at in enumerate(zip(theirs.sample.tolist(), theirs.position.tolist(), strict=True))}
    seen = np.zeros(len(row_of), bool)
    for rank, record in enumerate(ranks):
        ours = record.steps[step].at_tokens.get(name)
        if ours is None:
            continue
        places = zip(ours.sample.tolist(), ours.position.tolist(), strict=True)
        rows = np.array([row_of.get(at, -1) for at in places], dtype=int)  # also where there is none
        if (rows < 0).any():
            verdict.miss(
                layer, f"rank {rank} has {int((rows < 0).sum())} tokens that are none of it", what=what, step=step
            )
            continue
        seen[rows] = True
        yield ours, rows
    if not seen.all():
        verdict.miss(layer, f"{int((~seen).sum())} of {len(seen)} tokens are on no rank", what=what, step=step)


def whole_of(pieces: Sequence[tuple[int, Piece]]) -> Array:
    """Return what the pieces of a tensor make up together, in fp64, which holds them exactly; nan where none lies."""
    whole = np.full(pieces[0][1].shape, np.nan)
    for _, piece in pieces:
        whole[box_of(piece)] = piece.values
    return whole


def by_name(ranks: Iterable[Mapping[str, Piece]]) -> dict[str, list[tuple[int, Piece]]]:
    """Return what the ranks hold of each tensor, with the rank."""
    found: dict[str, list[tuple[int, Piece]]] = {}
    for rank, held in enumerate(ranks):
        for name, piece in held.items():
            found.setdefault(name, []).append((rank, piece))
    return found


def _judge(verdict: Verdict, what: str, name: str, step: int, error: float, allowed: float, note: str = "") -> None:
    verdict.worst = max(verdict.worst, error)
    if not error <= allowed:
        verdict.differences.append(Difference(what, name, step, error, note))


def _worst(ranks: Sequence[RankRecord], step: int, what: Literal["loss", "norm"], one: RankRecord) -> float:
    """Return by how much the rank is off that is off most: every rank is to know the loss and the norm of all."""
    theirs = getattr(one.steps[step], what)
    return max(_relative(getattr(record.steps[step], what), theirs) for record in ranks)


def _relative(ours: float, theirs: float) -> float:
    return _relative_to(abs(ours - theirs), abs(theirs)) if np.isfinite(ours) else np.inf


def _relative_to(error: float, size: float) -> float:
    return _finite(error / size) if size else (0.0 if error == 0 else np.inf)
