"""A layout in the run file's own precision, where that is below fp32: is it as near to fp64 as one process is?

    error of a tensor   |gradient - gradient in fp64| / |gradient in fp64|, 2-norms; every step from the same weights
    all together        the root of the mean square of all tensors' errors: TOGETHER times that of one process
    each tensor         TIMES the error of one process in the same precision, by the same experts

sums                    of gradients over micro-batches and ranks, and of a rank's losses: numbers of which some are
                        none of bf16, as sums in fp32 are; what is sent to be summed over samples is fp32

after the last update   the weights that the model goes on with are the masters, rounded to their type: equal bits

Both figures are measured (docs/measured/proof.md). The errors of two ways of rounding are two draws of noise: over
thousands of numbers they are equal, over the eight of a small norm one is easily twice the other. So where one process
happens to be very near in one tensor, its typical error counts; of a single number (loss, norm), what it was off by in
any step, or ROUNDED if that is more.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import frexp
from statistics import median

import numpy as np
import torch

from meshwright.launcher.proof.compare import TIMES, Verdict, box_of, by_name, errors_of, is_nothing, whole_of
from meshwright.launcher.proof.record import Array, RankRecord

TOGETHER = 2.0
ROUNDED = {"loss": 2.0**-13, "norm": 2.0**-11}
_BITS = 16
"""That a sum of a few numbers of bf16, with 8 bits each, has at most; of fp32 there are 24 in each."""
_ENOUGH = 64
"""Numbers of a tensor that are not all of bf16 by chance: one sum of two is none with a chance of about 1/2."""


def compare_own(exact: RankRecord, one: RankRecord, ranks: Sequence[RankRecord]) -> Verdict:
    """Compare both with the fp64 record; the verdict's `worst` is how many times one process' error a layout's is."""
    verdict = Verdict([])
    of_one, of_ranks = ({(step, name): e for step, name, e in errors_of(exact, of)} for of in ([one], ranks))
    numbers = {
        name: max([least, *(e for (_, at), e in of_one.items() if at == name)]) for name, least in ROUNDED.items()
    }
    for step in range(len(exact.steps)):
        tensors = [name for at, name in of_one if at == step and name not in ROUNDED]
        typical = median(of_one[step, name] for name in tensors)
        together = mean_square(of_ranks, step, tensors) / mean_square(of_one, step, tensors)
        verdict.worst = max(verdict.worst, together**0.5)
        if not together**0.5 <= TOGETHER:
            _add(verdict, "all together", step, together**0.5)
        for name in (*ROUNDED, *reversed(tensors)):
            allowed = numbers[name] if name in ROUNDED else max(of_one[step, name], typical)
            times = of_ranks.get((step, name), np.inf) / allowed
            if not times <= TIMES:
                _add(verdict, name, step, times)
    return verdict


def compare_sums(verdict: Verdict, exact: RankRecord, ranks: Sequence[RankRecord], summands: int) -> None:
    """Add a difference for each gradient of several summands whose numbers are all of bf16: it was summed so.

    And for sums over samples that are sent in bf16, and for a loss whose tokens are summed in bf16. Such a sum is
    within the error that the products have anyway, so that the errors do not tell. The steps are taken together: in one
    of them all summands but one may have no target. What is zero in fp64 but for rounding shows nothing.
    """
    for rank, record in enumerate(ranks):
        for words in sorted(record.narrow_sums):
            verdict.miss("", f"rank {rank} sums {words}", what="sum")
    shares = [step.share for record in ranks for step in record.steps if step.share]
    if shares and all((share / 2 ** frexp(share)[1] * 2**_BITS).is_integer() for share in shares):
        verdict.miss("", "the losses of a rank's tokens are summed in bf16", what="loss")
    if summands < 2:  # one product's result, which is of bf16
        return
    steps = range(len(ranks[0].steps))
    for name, pieces in by_name(record.steps[step].gradients for record in ranks for step in steps).items():
        if all(is_nothing(step, name) for step in exact.steps):
            continue
        values = np.concatenate([piece.values.reshape(-1) for _, piece in pieces])
        values = values[values != 0]
        if len(values) >= _ENOUGH and np.array_equal(values, _rounded(values, "bf16")):
            verdict.miss(name, "the sum holds no more than bf16 does", step=len(steps) - 1)


def compare_computed(verdict: Verdict, ranks: Sequence[RankRecord], precision: str) -> None:
    """Hold what the model computes with after the last update against the masters, rounded as in that precision.

    Adds a difference for each tensor of which a rank has other bits, and one if no weight has moved.
    """
    step = len(ranks[0].steps) - 1
    before, masters = masters_after(ranks, step - 1, precision), _masters(ranks, step)
    after = {name: _rounded(whole, precision) for name, whole in masters.items()}
    if all(np.array_equal(before[name], after[name]) for name in after):
        verdict.miss("", "the update moved none, so that nothing was shown", what="weight", step=step)
    for name, note in other_than_masters(ranks, after):
        verdict.miss(name, note, what="weight", step=step)
    if precision == "bf16" and all(np.array_equal(masters[name], after[name]) for name in after):
        verdict.miss("", "the masters hold no more than bf16 does", what="weight", step=step)


def other_than_masters(ranks: Sequence[RankRecord], masters: Mapping[str, Array]) -> Iterator[tuple[str, str]]:
    """Yield each tensor that a rank computes with in other numbers than the masters, which are rounded as it is."""
    for name, whole in masters.items():
        theirs = [(rank, record.computed[name]) for rank, record in enumerate(ranks) if name in record.computed]
        old = [rank for rank, piece in theirs if not np.array_equal(piece.values, whole[box_of(piece)])]
        if old or not theirs:
            yield name, f"rank {old[0]} goes on with other numbers than its masters" if old else "no rank has it"


def masters_after(ranks: Sequence[RankRecord], step: int, precision: str) -> dict[str, Array]:
    """Return the weights after a step, whole, rounded to the type that the model computes with."""
    return {name: _rounded(whole, precision) for name, whole in _masters(ranks, step).items()}


def _masters(ranks: Sequence[RankRecord], step: int) -> dict[str, Array]:
    """Return the global weights that the ranks' pieces make up after a step."""
    held = by_name(record.steps[step].weights for record in ranks)
    return {name: whole_of(pieces) for name, pieces in held.items()}


def _rounded(whole: Array, precision: str) -> Array:
    """Return a weight in the numbers that the model computes with."""
    if precision != "bf16":
        return whole
    exact = torch.from_numpy(whole)
    return exact.bfloat16().to(exact.dtype).numpy()


def mean_square(errors: Mapping[tuple[int, str], float], step: int, tensors: Sequence[str]) -> float:
    """Return the mean of the squared errors of these tensors in a step."""
    return sum(errors.get((step, name), np.inf) ** 2 for name in tensors) / len(tensors)


def _add(verdict: Verdict, name: str, step: int, times: float) -> None:
    what = name if name in ROUNDED else "gradient"
    note = f"{times:.3g} times as far from fp64 as one process"
    verdict.miss("" if name in ROUNDED else name, note, what=what, step=step, error=times)
