"""Which window of a split is which sample: a pure function of the seed and the global sample index.

A window is seq_len + 1 tokens, inputs and targets; it begins where the one before had its last target:

    tokens      0 1 2 3 4 5 6 7 8 9 10 11 ...      seq_len = 4
    window 0    0 1 2 3 4
    window 1            4 5 6 7 8                  a document longer than a window goes on in the next
    window 2                    8 9 10 11 12

so that in each epoch every token is a target once; only a rest shorter than a window is left out. Sample i
is of epoch i // W, for W windows, and at place i % W in a permutation of them that (seed, epoch) decides.
The permutation is computed at a place and never stored: a Feistel network over the next power of four,
walked until it lands below W. So the order costs no memory and no time at the start, and does not know
ranks, workers, batch sizes or the length of the run.
"""

from functools import lru_cache
from hashlib import blake2b
from operator import index
from typing import SupportsIndex

ROUNDS = 6
MASK_64 = 2**64 - 1


class SampleOrder:
    """The endless row of samples of one split."""

    def __init__(self, num_tokens: int, seq_len: int, seed: int) -> None:
        """Take the length of the split, of a window, and the seed of the run.

        Raises:
            ValueError: if the split is too short for one window.
        """
        if num_tokens < seq_len + 1:
            raise ValueError(
                f"seq_len = {seq_len}: one sample needs {seq_len + 1:,} tokens, the split has {num_tokens:,}; "
                "take a smaller seq_len or prepare more text"
            )
        self.seq_len = seq_len
        self.seed = seed
        self.samples_per_epoch = (num_tokens - 1) // seq_len
        self._half_bits = ((self.samples_per_epoch - 1).bit_length() + 1) // 2

    def window(self, sample_index: SupportsIndex) -> int:
        """Return the position of the first token of a sample; the sample is seq_len + 1 tokens from there on."""
        epoch, place = divmod(index(sample_index), self.samples_per_epoch)
        keys = _round_keys(self.seed, epoch)
        # Outside the epoch's windows a place leads on to another place, and some day back in: that is what
        # makes a permutation of the next power of four one of any size.
        window = self._permute(place, keys)
        while window >= self.samples_per_epoch:
            window = self._permute(window, keys)
        return window * self.seq_len

    def _permute(self, place: int, keys: tuple[int, ...]) -> int:
        """Permute the numbers of 2 * half_bits bits."""
        bits = self._half_bits
        mask = (1 << bits) - 1
        left, right = place >> bits, place & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return left << bits | right


def _mix(x: int) -> int:
    """Scramble 64 bits (the finaliser of SplitMix64)."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK_64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK_64
    return x ^ x >> 31


@lru_cache(maxsize=16)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    digest = blake2b(f"meshwright sample order, seed {seed}, epoch {epoch}".encode(), digest_size=8 * ROUNDS).digest()
    return tuple(int.from_bytes(digest[at : at + 8], "little") for at in range(0, len(digest), 8))
