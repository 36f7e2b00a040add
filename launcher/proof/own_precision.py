"""A layout in the run file's own precision, where that is below fp32: is it as near to fp64 as one process is?

    error of a tensor   |gradient - gradient in fp64| / |gradient in fp64|, 2-norms; every step from the same weights
    allowed             OWN_TIMES the error of one process in the same precision, by the same experts

Where one process happens to be very near, as with a number or a short vector it may be by chance, the typical error of
all its tensors in that step counts instead.
"""

from collections.abc import Sequence
from statistics import median

from meshwright.launcher.proof.compare import Verdict, errors_of
from meshwright.launcher.proof.record import RankRecord

OWN_TIMES = 2.0
"""As measured (docs/measured/proof.md)."""


def compare_own(exact: RankRecord, one: RankRecord, ranks: Sequence[RankRecord]) -> Verdict:
    """Compare both with the fp64 record; the verdict's `worst` is how many times one process' error a layout's is."""
    verdict = Verdict([])
    of_one = {(step, name): error for step, name, error in errors_of(exact, [one])}
    typical = {
        step: median(error for (at, _), error in of_one.items() if at == step) for step in range(len(exact.steps))
    }
    for step, name, error in errors_of(exact, ranks):
        times = error / max(of_one[step, name], typical[step])
        verdict.worst = max(verdict.worst, times)
        if not times <= OWN_TIMES:
            verdict.miss(name, f"{times:.3g} times as far from fp64 as one process", step=step, error=times)
    return verdict
