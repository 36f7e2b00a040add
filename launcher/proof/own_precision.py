"""A layout in the run file's own precision, where that is below fp32: is it as near to fp64 as one process is?

    error of a tensor   |gradient - gradient in fp64| / |gradient in fp64|, 2-norms; every step from the same weights
    all together        the root of the mean square of all tensors' errors: TOGETHER times that of one process
    each tensor         TIMES the error of one process in the same precision, by the same experts

Both figures are measured (docs/measured/proof.md). The errors of two ways of rounding are two draws of noise: over
thousands of numbers they are equal, over the eight of a small norm one is easily twice the other. So where one process
happens to be very near in one tensor, its typical error counts; of a single number (loss, norm), what it was off by in
any step, or ROUNDED if that is more.
"""

from collections.abc import Mapping, Sequence
from statistics import median

from meshwright.launcher.proof.compare import Verdict, errors_of
from meshwright.launcher.proof.record import RankRecord

TOGETHER, TIMES = 2.0, 4.0
ROUNDED = {"loss": 2.0**-13, "norm": 2.0**-11}


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
            times = of_ranks[step, name] / allowed
            if not times <= TIMES:
                _add(verdict, name, step, times)
    return verdict


def mean_square(errors: Mapping[tuple[int, str], float], step: int, tensors: Sequence[str]) -> float:
    """Return the mean of the squared errors of these tensors in a step."""
    return sum(errors[step, name] ** 2 for name in tensors) / len(tensors)


def _add(verdict: Verdict, name: str, step: int, times: float) -> None:
    what = name if name in ROUNDED else "gradient"
    note = f"{times:.3g} times as far from fp64 as one process"
    verdict.miss("" if name in ROUNDED else name, note, what=what, step=step, error=times)
