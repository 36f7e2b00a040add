"""The next token is what transformers' warpers allow, and the inverse of its distribution picks it."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from meshwright.model.generation.sampling import Sampling, kept_probabilities, next_tokens, uniforms_at

B, V = 5, 37


def some_logits(seed: int = 0) -> torch.Tensor:
    return 3.0 * torch.randn(B, V, generator=torch.Generator().manual_seed(seed))


def uniform(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def by_token(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    probabilities, tokens = kept_probabilities(logits, sampling)
    kept = torch.zeros_like(probabilities).scatter(1, tokens, probabilities)
    return kept / kept.sum(dim=-1, keepdim=True)


def by_transformers(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    ids, scores = torch.zeros(B, 1, dtype=torch.int64), logits.double()
    if sampling.temperature != 1.0:
        scores = TemperatureLogitsWarper(sampling.temperature)(ids, scores)
    if sampling.top_k > 0:
        scores = TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1.0:
        scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
    return scores.softmax(dim=-1)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 7, V, 2 * V])
@pytest.mark.parametrize("top_p", [1e-6, 0.5, 0.93, 1.0])
def test_the_distribution_is_that_of_transformers_warpers(temperature: float, top_k: int, top_p: float) -> None:
    sampling = Sampling(temperature, top_k, top_p)
    for seed in range(3):
        logits = some_logits(seed)
        torch.testing.assert_close(by_token(logits, sampling), by_transformers(logits, sampling))


def test_tokens_come_as_often_as_their_probability_says() -> None:
    logits, sampling = some_logits()[:1], Sampling(temperature=1.5, top_k=6, top_p=0.9)
    draws = 4000
    evenly = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    tokens = next_tokens(logits.expand(draws, V), sampling, evenly)
    often = torch.bincount(tokens, minlength=V) / draws
    torch.testing.assert_close(often, by_token(logits, sampling)[0].to(often), atol=1 / draws, rtol=0)


def test_greedy_takes_the_likeliest_and_the_lowest_id_among_equals() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [3.0, 3.0, 3.0, 3.0], [-1.0, -5.0, -2.0, 0.5]])
    for sampling in (Sampling(temperature=0.0), Sampling(top_k=1), Sampling(top_p=1e-9)):
        assert next_tokens(logits, sampling, uniform(0.0, 0.5, 0.999)).tolist() == [1, 0, 3]


def test_top_k_keeps_exactly_k_of_equals_and_the_border_of_top_p_is_inclusive() -> None:
    equal = torch.zeros(1, 4)
    assert (kept_probabilities(equal, Sampling(top_k=3))[0] > 0).sum() == 3
    assert kept_probabilities(equal, Sampling(top_k=3))[1][0, :3].tolist() == [0, 1, 2]
    # Four times 1/4: two of them reach 0.5 exactly, so a third is not needed; 0.51 needs it.
    assert (kept_probabilities(equal, Sampling(top_p=0.5))[0] > 0).sum() == 2
    assert (kept_probabilities(equal, Sampling(top_p=0.51))[0] > 0).sum() == 3


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=5), Sampling(top_p=0.8)])
def test_the_ends_of_the_uniform_number_never_leave_what_is_kept(sampling: Sampling) -> None:
    logits = some_logits()
    logits[:, ::3] = float("-inf")
    kept = by_token(logits, sampling) > 0
    for value in (0.0, 1.0 - 2.0**-53, 1.0):  # 1.0 stands for a threshold that was rounded up
        tokens = next_tokens(logits, sampling, uniform(*[value] * B))
        assert kept.gather(1, tokens[:, None]).all()
    first = next_tokens(logits, sampling, uniform(*[0.0] * B))
    assert first.tolist() == logits.argmax(dim=-1).tolist()


def test_a_number_on_the_border_of_two_tokens_takes_the_second() -> None:
    numbers = uniform(0.0, 0.2499, 0.25, 0.5, 0.75)
    assert next_tokens(torch.zeros(5, 4), Sampling(), numbers).tolist() == [0, 0, 1, 2, 3]


def test_a_row_chooses_the_same_alone_and_in_a_batch() -> None:
    logits, sampling = some_logits(), Sampling(temperature=1.2, top_p=0.95)
    numbers = uniforms_at(seed=3, step=11, num_sequences=B)
    together = next_tokens(logits, sampling, numbers)
    alone = [next_tokens(logits[i : i + 1], sampling, numbers[i : i + 1]).item() for i in range(B)]
    assert together.tolist() == alone


def test_draws_are_a_function_of_seed_step_and_sequence() -> None:
    drawn = {(seed, step): uniforms_at(seed, step, 4).tolist() for seed in range(3) for step in range(3)}
    assert len({number for numbers in drawn.values() for number in numbers}) == 3 * 3 * 4
    assert uniforms_at(2, 1, 4).tolist() == drawn[2, 1]
    assert uniforms_at(2, 1, 2).tolist() == drawn[2, 1][:2]


def test_logits_in_bf16_and_their_dtype_change_nothing_but_their_own_rounding() -> None:
    logits = some_logits().bfloat16()
    numbers = uniforms_at(0, 0, B)
    assert torch.equal(next_tokens(logits, Sampling(), numbers), next_tokens(logits.double(), Sampling(), numbers))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_cannot_be_chosen_from_is_named(bad: float) -> None:
    logits = some_logits()
    logits[1, 4] = bad
    logits[3] = float("-inf")
    for sampling in (Sampling(), Sampling(temperature=0.0)):
        with pytest.raises(ValueError, match=r"rows \[1, 3\] hold NaN"):
            next_tokens(logits, sampling, uniform(*[0.5] * B))


def test_every_meaningless_setting_is_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"temperature = -1.0.*top_k = -2.*top_p = 0.0"):
        Sampling(temperature=-1.0, top_k=-2, top_p=0.0)
    half = Sampling()
    object.__setattr__(half, "top_k", 1.5)  # in a run of tests types are checked when it is made, elsewhere not
    with pytest.raises(ValueError, match=r"top_k = 1\.5: must be 0 \(off\) or a whole number of tokens"):
        half.__post_init__()
    with pytest.raises(ValueError, match="temperature = nan"):
        Sampling(temperature=float("nan"))


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-308, 1e-300])
def test_a_temperature_that_nothing_can_be_divided_by_is_nearly_greedy(temperature: float) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, float("-inf")], [-2.0, -1.0, -5.0, -9.0]])
    probabilities, _ = kept_probabilities(logits, Sampling(temperature))
    assert probabilities.tolist() == [[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    assert next_tokens(logits, Sampling(temperature), torch.tensor([0.9, 0.9])).tolist() == [2, 1]
