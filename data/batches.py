"""The batches of a rank: its part of each step's samples, read ahead by a thread.

Samples are numbered through the whole run. A step takes the next B of them, and rank r of R a block:

    samples     p . . . . . . . . . . . p + B      B = 12, R = 3
    ranks       0 0 0 0 1 1 1 1 2 2 2 2

so that a run's position is p, one count, whatever the layout, and however far the thread has read ahead.
This file knows ranks as two numbers.
"""

import queue
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from meshwright.data.order import SampleOrder
from meshwright.data.store import Split

POLL_SECONDS = 0.2  # how often a thread with nothing to do looks whether it was told to stop


@dataclass(frozen=True)
class Batch:
    """Samples of one step: tokens, the document that each token is of, and the samples' global indices."""

    tokens: Int64[np.ndarray, "b s_plus_1"]
    document: Int64[np.ndarray, "b s_plus_1"]
    sample: Int64[np.ndarray, "b"]


def fetch(split: Split, order: SampleOrder, samples: range) -> Batch:
    """Read samples by their global indices."""
    tokens = np.empty((len(samples), order.seq_len + 1), np.int64)
    document = np.empty_like(tokens)
    for row, sample in enumerate(samples):
        start = order.window(sample)
        tokens[row] = split.read(start, order.seq_len + 1)
        document[row] = split.documents_of(start, order.seq_len + 1)
    return Batch(tokens, document, np.array(samples, np.int64))


@dataclass(frozen=True)
class _Plan:
    """All that decides a rank's batches; shared with the thread, which must not hold the iterator itself."""

    split: Split
    order: SampleOrder
    batch_size_at: Callable[[int], int]
    rank: int
    num_ranks: int

    def batch(self, position: int) -> tuple[Batch, int]:
        """Return the rank's part of the step that begins at sample `position`, and where the next one begins."""
        size = self.batch_size_at(position)
        if size <= 0 or size % self.num_ranks != 0:
            raise ValueError(
                f"the batch of {size} samples at sample {position} does not divide by {self.num_ranks} ranks"
            )
        part = size // self.num_ranks
        first = position + self.rank * part
        return fetch(self.split, self.order, range(first, first + part)), position + size


class Batches:
    """An endless iterator over one rank's batches; `state_dict` says how many samples were handed out."""

    def __init__(
        self,
        split: Split,
        order: SampleOrder,
        first_sample: int,
        batch_size_at: Callable[[int], int],
        rank: int = 0,
        num_ranks: int = 1,
        prefetch: int = 2,
    ) -> None:
        """Begin at `first_sample`; `batch_size_at(samples consumed)` is the global batch size of the step there.

        With `prefetch` = 0 batches are read when they are asked for, without a thread.

        Raises:
            ValueError: if there is no such rank.
        """
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank {rank} is not one of {num_ranks}")
        self._plan = _Plan(split, order, batch_size_at, rank, num_ranks)
        self._prefetch = prefetch
        self._position = first_sample
        self._reader: _Reader | None = None
        self._closed = False

    def __iter__(self) -> "Batches":
        """Return itself: there is one position."""
        return self

    def __next__(self) -> Batch:
        """Return the rank's part of the next step's batch; what went wrong in the thread is raised here.

        Raises:
            ValueError: after `close`, or when a batch does not divide by the ranks.
            StoreError: if the store is damaged where this batch lies.
        """
        if self._closed:
            raise ValueError("these batches were closed")
        if self._prefetch == 0:
            batch, self._position = self._plan.batch(self._position)
            return batch
        if self._reader is None:
            self._reader = _Reader(self._plan, self._position, self._prefetch)
            # An iterator that is dropped without close() must not leave a thread behind.
            weakref.finalize(self, self._reader.stop.set)
        batch, self._position = self._reader.get()
        return batch

    def state_dict(self) -> dict[str, int]:
        """Return the position: the samples, over all ranks, that were handed out, not those read ahead."""
        return {"samples": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position; what was read ahead is dropped."""
        self._end_reader()
        self._position = state["samples"]

    def close(self) -> None:
        """End the thread. Further calls of `next` raise."""
        self._end_reader()
        self._closed = True

    def _end_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


class _Reader:
    """A thread that reads batches ahead into a queue of bounded length."""

    def __init__(self, plan: _Plan, position: int, ahead: int) -> None:
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self.results: queue.Queue[tuple[Batch, int] | BaseException] = queue.Queue(maxsize=ahead)
        self.thread = threading.Thread(
            target=_read_ahead, args=(plan, position, self.results, self.stop), name="batches", daemon=True
        )
        self.thread.start()

    def get(self) -> tuple[Batch, int]:
        """Return the next batch and the position after it; raise what stopped the thread, each time."""
        if self.error is None:
            result = self.results.get()
            if isinstance(result, tuple):
                return result
            self.error = result
        raise self.error

    def close(self) -> None:
        self.stop.set()
        # Make room, where the thread waits for it: it would look only after its poll whether it is to stop.
        with suppress(queue.Empty):
            self.results.get_nowait()
        self.thread.join()


def _read_ahead(
    plan: _Plan, position: int, results: "queue.Queue[tuple[Batch, int] | BaseException]", stop: threading.Event
) -> None:
    while not stop.is_set():
        result: tuple[Batch, int] | BaseException
        try:
            result = plan.batch(position)
            position = result[1]
        except BaseException as error:  # whatever it is, the caller of next() must see it, not wait for ever
            result = error
        while not stop.is_set():
            try:
                results.put(result, timeout=POLL_SECONDS)
                break
            except queue.Full:
                continue
        if isinstance(result, BaseException):
            return
