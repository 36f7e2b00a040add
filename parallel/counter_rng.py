"""Random numbers that are a function of where they are used, never of who draws them or in which order.

Philox 4x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a key of
64 bits, made from a seed and a name, and a counter of 128 bits give four words of 32 bits.

An initial weight is element i of the stream `(seed, name)`, word i % 4 of counter i // 4, so any rank can produce any
stretch of it alone:

    stream   (7, "layers.0.mixer.part.q.weight")   0 1 2 3 | 4 5 6 7 | 8 ...
    counter                                           0    |    1    | 2 ...

A draw within a layer has the layer's name in its key and its place in the counter, so that it is the same however the
tokens and the features are cut, and when the layer is recomputed:

    counter  (index // 4, position, sample, step)     word  index % 4     index: of a feature, a head or an expert

Everything is computed in integers, and where a number is needed in fp64, so that it is the same bits on every device
that rounds as IEEE 754 does. Initial weights are made on the CPU, draws on the device of the tokens.
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


def philox_words(key: tuple[int, int], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return the four words of 32 bits of each counter, given as four words that are broadcast against each other."""
    c0, c1, c2, c3 = (word & _MASK for word in counter)
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
    return c0, c1, c2, c3


def philox(key: tuple[int, int], counter: Int64[Tensor, " c"]) -> Int64[Tensor, "c 4"]:
    """Return four words of 32 bits for each counter; the upper 64 bits of the counter are zero."""
    zero = torch.zeros_like(counter)
    return torch.stack(philox_words(key, (counter, counter >> 32, zero, zero)), dim=1)


def draw_words(
    key: tuple[int, int],
    step: int,
    sample: Int64[Tensor, " b"],
    position: Int64[Tensor, " s"],
    first_index: int,
    count: int,
) -> Int64[Tensor, "s b n"]:
    """Return a word of 32 bits for each token and each of `count` indices from `first_index` on."""
    device = sample.device
    first, last = first_index // 4, (first_index + count + 3) // 4
    counter = (
        torch.arange(first, last, device=device)[None, None, :],
        position[:, None, None],
        sample[None, :, None],
        torch.full((1, 1, 1), step, device=device),
    )
    words = torch.stack(philox_words(key, counter), dim=-1).flatten(2)
    return words[..., first_index - 4 * first :][..., :count]


def draw_row_words(
    key: tuple[int, int],
    step: int,
    place: tuple[Int64[Tensor, " r"], Int64[Tensor, " r"], Int64[Tensor, " r"]],
    first_index: int,
    count: int,
) -> Int64[Tensor, "r n"]:
    """Return a word of 32 bits for each row and each of `count` indices from `first_index` on.

    `place` is each row's sample, position and first counter: how many fours of indices lie before its index 0.
    """
    sample, position, before = place
    first, last = first_index // 4, (first_index + count + 3) // 4
    counter = (
        torch.arange(first, last, device=sample.device)[None] + before[:, None],
        position[:, None],
        sample[:, None],
        torch.full((1, 1), step, device=sample.device),
    )
    words = torch.stack(philox_words(key, counter), dim=-1).flatten(1)
    return words[:, first_index - 4 * first :][:, :count]


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
