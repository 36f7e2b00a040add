"""Random numbers that are a function of where they are used, never of who draws them or in which order.

Philox 4x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a key of
64 bits, made from a seed and a name, and a counter of 128 bits give four words of 32 bits. Element i of the
stream `(seed, name)` is word i % 4 of counter i // 4, so any rank can produce any stretch of it alone:

    stream   (7, "layers.0.mixer.part.q.weight")   0 1 2 3 | 4 5 6 7 | 8 ...
    counter                                           0    |    1    | 2 ...

Everything is computed on the CPU in integers and fp64, so that the numbers are the same bits on every machine
that rounds as IEEE 754 does, whatever the device that they are copied to.
"""

import hashlib

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_ROUNDS = 10


def stream_key(seed: int, name: str) -> tuple[int, int]:
    """Return the two key words of the stream that belongs to a seed and a name."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def philox(key: tuple[int, int], counter: Int64[Tensor, " c"]) -> Int64[Tensor, "c 4"]:
    """Return four words of 32 bits for each counter; the upper 64 bits of the counter are zero."""
    c0, c1 = counter & _MASK, (counter >> 32) & _MASK
    c2, c3 = torch.zeros_like(counter), torch.zeros_like(counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The products wrap modulo 2^64; the mask after the arithmetic shift takes off the sign.
        p0, p1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=1)


def uniform_at(seed: int, name: str, index: Int64[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """Return numbers in (0, 1), evenly spread over 2^32 values, for elements `index` of the stream."""
    words = philox(stream_key(seed, name), index >> 2).gather(1, (index & 3)[:, None])[:, 0]
    return (words.double() + 0.5) / 2.0**32


def uniform_range(seed: int, name: str, begin: int, end: int) -> Float64[Tensor, " n"]:
    """Return `uniform_at` for the elements from `begin` to `end`, each counter computed once."""
    first = begin >> 2
    counters = torch.arange(first, (end + 3) >> 2)
    words = philox(stream_key(seed, name), counters).flatten()[begin - 4 * first : end - 4 * first]
    return (words.double() + 0.5) / 2.0**32


def normal_from_uniform(uniform: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """Return standard normal numbers by inverting the normal distribution; none is beyond 6.4."""
    normal: Tensor = torch.erfinv(2.0 * uniform - 1.0) * 2.0**0.5
    return normal
