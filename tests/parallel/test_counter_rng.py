"""Philox against its published answers and its definition, and the streams that are cut from it.

Ours gives the three answers that its authors publish, and what a Philox on whole Python numbers gives, which is held to
the same answers.
"""

import math

import pytest
import torch

from meshwright.parallel.counter_rng import (
    draw_words,
    normal_from_uniform,
    philox,
    philox_words,
    stream_key,
    uniform_at,
    uniform_range,
)

KNOWN = [  # Random123, examples/kat_vectors: counter, key, answer
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def by_definition(counter: list[int], key: list[int]) -> list[int]:
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        high_a, low_a = divmod(a * 0xD2511F53, 2**32)
        high_c, low_c = divmod(c * 0xCD9E8D57, 2**32)
        a, b, c, d = high_c ^ b ^ k, low_c, high_a ^ d ^ m, low_a
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return [a, b, c, d]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_the_definition_used_here_gives_the_published_answers(counter: str, key: str, answer: str) -> None:
    assert by_definition(words(counter), words(key)) == words(answer)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_published_answers(counter: str, key: str, answer: str) -> None:
    of_key = words(key)
    of_counter = [torch.tensor([word]) for word in words(counter)]
    found = philox_words((of_key[0], of_key[1]), (of_counter[0], of_counter[1], of_counter[2], of_counter[3]))
    assert [word.item() for word in found] == words(answer)


def test_philox_by_one_number_has_zeros_in_the_upper_half_of_the_counter() -> None:
    counter, key, answer = (words(text) for text in KNOWN[0])
    assert philox((key[0], key[1]), torch.tensor([counter[0]])).tolist() == [answer]


def test_a_draw_is_a_word_of_the_counter_that_is_its_place() -> None:
    key = stream_key(7, "layers.3.mixer/dropout")
    sample, position = torch.tensor([2**33 + 5, 9]), torch.tensor([0, 70_000, 4])
    drawn = draw_words(key, 2**31 + 3, sample, position, 6, 7)
    for s, b, i in [(0, 0, 0), (1, 0, 1), (2, 1, 2), (1, 1, 6), (0, 1, 5)]:
        index = 6 + i
        counter = [index // 4, int(position[s]), int(sample[b]) % 2**32, 2**31 + 3]
        assert drawn[s, b, i] == by_definition(counter, list(key))[index % 4]


def test_philox_is_its_definition_for_any_key_and_counters_beyond_32_bits() -> None:
    counters = [0, 1, 2**32 - 1, 2**32, 0x243F6A88_85A308D3, 2**62 + 12345, 2**63 - 1]
    for key in ((0xFFFFFFFF, 0xFFFFFFFF), (0xA4093822, 0x299F31D0)):
        expected = [by_definition([c % 2**32, c >> 32, 0, 0], list(key)) for c in counters]
        assert philox(key, torch.tensor(counters)).tolist() == expected


def test_an_element_is_a_word_of_its_counter() -> None:
    key = stream_key(7, "layers.0.mixer.part.q.weight")
    block = philox(key, torch.arange(3)).flatten()
    expected = (block.double() + 0.5) / 2**32
    assert torch.equal(uniform_at(7, "layers.0.mixer.part.q.weight", torch.arange(12)), expected)


@pytest.mark.parametrize("begin", [0, 1, 2, 3, 4, 1001, 2**34 + 5])
@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 17])
def test_a_stretch_is_bitwise_the_elements_one_by_one(begin: int, length: int) -> None:
    one_by_one = uniform_at(3, "w", torch.arange(begin, begin + length))
    assert torch.equal(uniform_range(3, "w", begin, begin + length), one_by_one)


def test_slices_of_normals_are_bitwise_slices_of_the_whole() -> None:
    # erfinv and the logarithms in it must not depend on where a number stands in a vector.
    whole = normal_from_uniform(uniform_range(1, "w", 0, 1003))
    for begin, end in ((0, 1), (1, 8), (5, 517), (1002, 1003), (7, 1003)):
        assert torch.equal(normal_from_uniform(uniform_range(1, "w", begin, end)), whole[begin:end])


def test_seeds_and_names_give_streams_of_their_own() -> None:
    streams = {(seed, name): uniform_range(seed, name, 0, 8) for seed in (0, 1, 11) for name in ("a", "b", "1/a")}
    values = [tuple(stream.tolist()) for stream in streams.values()]
    assert len(set(values)) == len(values)
    assert stream_key(1, "1/a") != stream_key(11, "/a")


def test_a_key_never_changes() -> None:
    # Checkpoints do not hold initial weights, seeds stand for them: another hash would be another model.
    assert stream_key(0, "embedding.weight") == (2703619027, 852595043)
    assert all(0 <= word < 2**32 for word in stream_key(5, "x"))


def test_normals_are_normal() -> None:
    n = 200_000
    sample = normal_from_uniform(uniform_range(0, "test", 0, n)).sort().values
    assert abs(sample.mean().item()) < 4 / math.sqrt(n)  # four standard errors
    assert abs(sample.var().item() - 1) < 4 * math.sqrt(2 / n)
    expected = torch.special.ndtr(sample)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((expected - steps[:-1]).abs(), (expected - steps[1:]).abs()).max().item()
    assert distance < 1.63 / math.sqrt(n)  # Kolmogorov and Smirnov, 1 percent
    neighbours = normal_from_uniform(uniform_range(0, "test", 0, n))
    for lag in (1, 2, 4):
        assert abs((neighbours[lag:] * neighbours[:-lag]).mean().item()) < 4 / math.sqrt(n)


def test_the_ends_of_the_distribution_are_finite() -> None:
    lowest, highest = 0.5 / 2**32, (2**32 - 0.5) / 2**32
    ends = normal_from_uniform(torch.tensor([lowest, 0.5, highest], dtype=torch.float64))
    assert ends[1] == 0
    assert ends[0] == -ends[2]
    assert 6.2 < ends[2].item() < 6.4
