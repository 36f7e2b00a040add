"""What ends a run before its last step, agreed by all ranks at the same step.

    SIGTERM, SIGUSR1    write a checkpoint and end cleanly (Slurm sends them before the time is up)
    SIGINT (Ctrl-C)     the same; a second one ends at once
    SIGUSR2             write a checkpoint and go on
    not a number        end at once, nothing is written: the last good checkpoint stays the newest
    norm spike          leave the update out and go on

A signal only sets a flag; the flag travels in the step's tally, so that ranks which got the signal at different
moments act on it together.
"""

import math
import signal
import statistics
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

from torch import Tensor

from meshwright.parallel.checkpoint.folder import checkpoint_path, list_checkpoints, step_of
from meshwright.parallel.tally import Tally

FLAGS = {"flag.stop": 1, "flag.save": 1}
_STOP = (signal.SIGTERM, signal.SIGUSR1)
_SAVE = (signal.SIGUSR2,)
_SPIKE_WINDOW = 64
_SPIKE_NEEDS = 16
_SHOWN = 32  # documents in a message


class Signals:
    """Signals received since the last step, as flags. Handlers only set them, so a second signal does no harm."""

    def __init__(self) -> None:
        """Install the handlers; call in the main thread."""
        self._stop = self._save = False
        for number in (*_STOP, signal.SIGINT):
            signal.signal(number, self._on_stop)
        for number in _SAVE:
            signal.signal(number, self._on_save)

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop = True
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True

    def raise_flags(self, tally: Tally) -> None:
        """Add this rank's flags to the step's tally. A save is asked for once, a stop stays."""
        tally.add("flag.stop", float(self._stop))
        tally.add("flag.save", float(self._save))
        self._save = False


def wants_stop(sums: dict[str, Tensor]) -> bool:
    """Say whether any rank was told to stop."""
    return bool(sums["flag.stop"] > 0)


def wants_save(sums: dict[str, Tensor]) -> bool:
    """Say whether any rank was asked for a checkpoint."""
    return bool(sums["flag.save"] > 0)


class NotANumberError(RuntimeError):
    """The loss or the gradient is no finite number; raised on every rank with the same words."""

    is_same_on_all_ranks = True

    def __init__(self, step: int, loss: float, norm: float, documents: Iterable[str], way_back: str) -> None:
        """Name the step, the documents of the batch where it happened, and what `way_back` says."""
        named = list(dict.fromkeys(documents))
        more = [f"and {len(named) - _SHOWN} more"] if len(named) > _SHOWN else []
        where = "\n  ".join([*named[:_SHOWN], *more])
        super().__init__(
            f"step {step}: loss = {loss}, gradient norm = {norm}; training cannot go on from here\n"
            f"the documents of the ranks' batches whose loss is not finite"
            f" (of all, where only the gradient is not):\n  {where}\n"
            f"{way_back}; lower learning_rate.peak, set train.skip_norm_spike, or look at these documents"
        )


def way_back(newest: Path | None, steps_made: int) -> str:
    """Say which checkpoint to go back to after the step that follows on `steps_made` gave no number.

    A checkpoint of exactly those steps holds the weights that gave it, and the run would come to it again.
    """
    if newest is None:
        return "there is no checkpoint yet"
    if step_of(newest) != steps_made:
        return f"the last good checkpoint is {newest}"
    earlier = [step for step in list_checkpoints(newest.parent) if step < steps_made]
    before = (
        f"the one before it is {checkpoint_path(newest.parent, earlier[-1])}" if earlier else "there is none before"
    )
    return f"the newest checkpoint, {newest}, holds the weights that gave this; {before}"


def is_finite(loss: float, norm: float) -> bool:
    """Say whether a step's numbers can be used."""
    return math.isfinite(loss) and math.isfinite(norm)


class SpikeGuard:
    """Says which steps to leave out: those whose norm exceeds a multiple of the median of the last 64.

    The first 16 norms are only watched. A skipped norm is not remembered, so that a burst cannot raise the limit.
    """

    def __init__(self, multiple: float, norms: Iterable[float] = ()) -> None:
        """Take the multiple (0 = never skip) and the norms remembered by a checkpoint."""
        self.multiple = multiple
        self.norms = deque(norms, maxlen=_SPIKE_WINDOW)

    def is_spike(self, norm: float) -> bool:
        """Say whether to leave the step out, and remember its norm if not."""
        enough = len(self.norms) >= _SPIKE_NEEDS
        if self.multiple > 0 and enough and norm > self.multiple * statistics.median(self.norms):
            return True
        self.norms.append(norm)
        return False
