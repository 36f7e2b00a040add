"""The router's losses against their formulas, written out sequence by sequence, and against transformers."""

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from meshwright.model.routers.balance import (
    choices_per_sequence,
    sequence_balance_loss,
    step_balance_loss,
    z_loss,
)

S, B, E, K = 9, 3, 5, 2
# Sequence 0 counts all its tokens, 1 some, 2 none.
COUNTED = torch.stack([torch.arange(S) < length for length in (S, 4, 0)], dim=1)
TOKENS = 20.0  # of the whole step: these 13 and some of other ranks


def scores_of(seed: int = 0) -> Tensor:
    return 2 * torch.randn(S, B, E, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def routed(scores: Tensor) -> tuple[Tensor, Tensor]:
    probability = scores.softmax(-1)
    return probability, probability.argsort(-1, descending=True)[..., :K]


def test_choices_are_counted_for_each_sequence_and_padding_is_not() -> None:
    _, expert = routed(scores_of())
    choices = choices_per_sequence(expert, COUNTED, E)
    for b in range(B):
        counts = [0] * E
        for s in range(S):
            for k in range(K):
                counts[expert[s, b, k]] += int(COUNTED[s, b])
        assert choices[b].tolist() == counts


def test_the_sequence_loss_is_its_formula() -> None:
    probability, expert = routed(scores_of())
    choices = choices_per_sequence(expert, COUNTED, E)
    loss = sequence_balance_loss(
        probability, choices, COUNTED, sequence_tokens=COUNTED.sum(0), top_k=K, step_tokens=TOKENS
    )
    expected = 0.0
    for b in range(B):
        mine = [s for s in range(S) if COUNTED[s, b]]
        if not mine:
            continue
        for e in range(E):
            share = sum(int((expert[s, b] == e).sum()) for s in mine) / (len(mine) * K)
            mean = sum(float(probability[s, b, e]) for s in mine) / len(mine)
            expected += len(mine) / TOKENS * E * share * mean
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_the_sequence_loss_is_one_where_all_experts_are_equal() -> None:
    probability = torch.full((S, 1, E), 1 / E, dtype=torch.float64)
    choices = torch.full((1, E), S * K // E)
    all_counted = torch.ones(S, 1, dtype=torch.bool)
    loss = sequence_balance_loss(
        probability, choices, all_counted, sequence_tokens=all_counted.sum(0), top_k=K, step_tokens=float(S)
    )
    assert loss.item() == pytest.approx(choices.sum().item() / (S * K))


def test_it_is_the_loss_of_transformers_up_to_top_k() -> None:
    # Theirs sums the shares over the k choices instead of averaging them, so it is k times ours, and its statistic is
    # of all tokens together: the same for one sequence without padding. Theirs is computed in the given type.
    scores = scores_of()[:, :1]
    probability, expert = routed(scores)
    counted = torch.ones(S, 1, dtype=torch.bool)
    choices = choices_per_sequence(expert, counted, E)
    ours = sequence_balance_loss(
        probability, choices, counted, sequence_tokens=counted.sum(0), top_k=K, step_tokens=float(S)
    )
    theirs = load_balancing_loss_func((scores.flatten(0, 1),), num_experts=E, top_k=K)
    assert ours.item() * K == pytest.approx(theirs.item(), rel=1e-6)


def test_the_step_loss_is_its_formula_with_the_shares_of_the_step_before() -> None:
    probability, _ = routed(scores_of())
    share = torch.tensor([0.5, 0.25, 0.125, 0.125, 0.0], dtype=torch.float64)
    loss = step_balance_loss(probability, share, COUNTED, step_tokens=TOKENS)
    expected = sum(
        E * float(share[e]) * float(probability[s, b, e]) / TOKENS
        for s in range(S)
        for b in range(B)
        for e in range(E)
        if COUNTED[s, b]
    )
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_the_z_loss_is_its_formula() -> None:
    scores = scores_of()
    expected = sum(float(scores[s, b].exp().sum().log()) ** 2 for s in range(S) for b in range(B) if COUNTED[s, b])
    assert z_loss(scores, COUNTED, step_tokens=TOKENS).item() == pytest.approx(expected / TOKENS, rel=1e-12)


def all_losses(scores: Tensor, part: slice = slice(None)) -> Tensor:
    probability, expert = routed(scores[:, part])
    counted = COUNTED[:, part]
    choices = choices_per_sequence(expert, counted, E)
    share = torch.full((E,), 0.2, dtype=torch.float64)
    return (
        sequence_balance_loss(
            probability, choices, counted, sequence_tokens=counted.sum(0), top_k=K, step_tokens=TOKENS
        )
        + 3 * step_balance_loss(probability, share, counted, step_tokens=TOKENS)
        + 7 * z_loss(scores[:, part], counted, step_tokens=TOKENS)
    )


def test_losses_add_up_over_any_cut_into_micro_batches() -> None:
    scores = scores_of()
    whole = all_losses(scores)
    assert all_losses(scores, slice(0, 1)) + all_losses(scores, slice(1, 3)) == pytest.approx(whole.item(), rel=1e-12)


def test_padding_gets_no_gradient_and_a_sequence_of_it_no_nan() -> None:
    scores = scores_of().requires_grad_()
    all_losses(scores).backward()
    assert torch.isfinite(scores.grad).all()
    assert (scores.grad[~COUNTED] == 0).all()
    assert (scores.grad[COUNTED].abs().sum(-1) > 0).all()
    assert all_losses(scores_of(), slice(2, 3)).item() == 0
