r"""The global batch size as a pure function of the samples consumed, so that a resumed run needs no state.

    batch_ramp = [{samples = 100, global_batch_size = 8}, {samples = 200, global_batch_size = 16}], then 32:

    samples consumed   0   8   16  ...  96 | 104  120  ...  200 | 232
    size of the step   8   8    8        8 |  16   16        32 |  32
                                           |                    |
                        the step that begins below 100 may end above it: its size is that of its first sample

This file loads no torch: `check` uses it too.
"""

from dataclasses import dataclass

from meshwright.launcher.runfile.tables import TrainConfig


@dataclass(frozen=True)
class BatchRamp:
    """Sizes that grow, or shrink, with the samples consumed, and the size that stays after the last of them."""

    entries: tuple[tuple[int, int], ...]
    """(samples at which it ends, size), by rising samples."""
    global_batch_size: int

    def __post_init__(self) -> None:
        """Refuse what is no ramp.

        Raises:
            ValueError: if a size is below 1, or the entries do not rise.
        """
        for size in (*(size for _, size in self.entries), self.global_batch_size):
            if size < 1:
                raise ValueError(f"train.batch_ramp: global_batch_size = {size} must be at least 1")
        before = 0
        for end, _ in self.entries:
            if end <= before:
                raise ValueError(
                    f"train.batch_ramp: samples = {end} must be above the {before} before it; sort the list"
                )
            before = end

    @classmethod
    def of(cls, table: TrainConfig) -> "BatchRamp":
        """Make the ramp of the [train] table."""
        entries = tuple((entry.samples, entry.global_batch_size) for entry in table.batch_ramp)
        return cls(entries, table.global_batch_size)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return every size that a step may have, each once, in the order of their first use."""
        return tuple(dict.fromkeys((*(size for _, size in self.entries), self.global_batch_size)))

    def size_at(self, samples: int) -> int:
        """Return the size of the step that begins when so many samples are consumed."""
        return next((size for end, size in self.entries if samples < end), self.global_batch_size)

    def samples_after(self, steps: int) -> int:
        """Return how many samples so many steps consume from the beginning of the run."""
        samples = 0
        for end, size in self.entries:
            in_entry = min(steps, _steps_to_cover(end - samples, size))
            samples += in_entry * size
            steps -= in_entry
        return samples + steps * self.global_batch_size


def _steps_to_cover(samples: int, size: int) -> int:
    """Return the number of steps of this size that holds so many samples; none if a step before went beyond them."""
    return max(0, -(-samples // size))
