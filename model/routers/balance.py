"""Losses that keep a router balanced and its scores small, as sums over tokens divided by the step's tokens.

    load balancing   e * sum_i f_i P_i     f_i: share of the choices that fell on expert i (sums to 1)
                                           P_i: mean probability of expert i
    z-loss           mean of logsumexp(scores)^2        (Zoph et al. 2022, equation 5)

The load-balancing loss (Fedus et al. 2021, equation 4) is 1 when all experts are equal. Over a whole step it would
depend on how the step is cut into micro-batches and ranks; so it is taken over each sequence, weighted by the
sequence's share of the step's tokens (`sequence`), or with the global f of the step before (`step`). Padding
counts nowhere.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def choices_per_sequence(
    expert: Int64[Tensor, "s b k"],
    counted: Bool[Tensor, "s b"],
    num_experts: int,
    taken: Bool[Tensor, "s b k"] | None = None,
) -> Int64[Tensor, "b e"]:
    """Return how often each expert was chosen by the counted tokens of each sequence; `taken`: not all are choices."""
    b = expert.shape[1]
    sequence = torch.arange(b, device=expert.device)[None, :, None]
    is_choice = counted[..., None] if taken is None else counted[..., None] & taken
    flat = torch.where(is_choice, sequence * num_experts + expert, b * num_experts)
    counts = torch.bincount(flat.flatten(), minlength=b * num_experts + 1)[:-1]
    return counts.view(b, num_experts)


def sequence_balance_loss(
    probability: Float[Tensor, "s b e"],
    choices: Int64[Tensor, "b e"],
    counted: Bool[Tensor, "s b"],
    *,
    sequence_tokens: Int64[Tensor, " b"],
    top_k: int,
    step_tokens: float,
) -> Float[Tensor, ""]:
    """Return the sum over sequences of (its tokens / the step's tokens) * e * sum(f * P).

    `choices` and `sequence_tokens` are of the whole sequence; of a sequence that lies on several ranks each returns the
    share of the tokens that it holds.
    """
    num_experts = probability.shape[-1]
    tokens = sequence_tokens.to(probability.dtype)
    summed = (probability * counted[..., None]).sum(0)
    # (n / N) * e * sum(c / (n k) * S / n), where c are choices and S summed probabilities, is this:
    per_sequence = (choices.to(probability.dtype) * summed).sum(-1) / tokens.clamp(min=1)
    return per_sequence.sum() * (num_experts / (top_k * step_tokens))


def step_balance_loss(
    probability: Float[Tensor, "s b e"], share: Float[Tensor, " e"], counted: Bool[Tensor, "s b"], *, step_tokens: float
) -> Float[Tensor, ""]:
    """Return this micro-batch's share of e * sum(f * P), with f the given global shares of the step before."""
    summed = (probability * counted[..., None]).sum((0, 1))
    return (share.to(probability.dtype) * summed).sum() * (probability.shape[-1] / step_tokens)


def z_loss(scores: Float[Tensor, "s b e"], counted: Bool[Tensor, "s b"], *, step_tokens: float) -> Float[Tensor, ""]:
    """Return the sum over counted tokens of logsumexp(scores)^2, divided by the step's tokens."""
    return (scores.logsumexp(-1).square() * counted).sum() / step_tokens
