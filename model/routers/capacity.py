"""Capacity: how many tokens of one sequence an expert takes, and which.

    capacity = ceil(factor * top_k * tokens / experts)      tokens: counted ones of the sequence, padding is none

An expert takes the first `capacity` of the choices that fell on it, in the order of the tokens' positions. So a later
token never displaces an earlier one: what a token computes does not depend on which experts later tokens choose, as in
a causal model it must not. (Only how many counted tokens the sequence has enters from behind it.) With batch-wide or
score-ordered capacity, as in GShard, it would depend on the other samples of the batch, and so on micro-batches and
ranks; over one sequence it does not. With factor 1.25, top-1 and 4 experts, 8 tokens make a capacity of 3:

    token      0  1  2  3  4  5  6  7
    expert     A  A  B  A  A  C  A  D        A has room for 0, 1 and 3; the choices of 4 and 6 are dropped

A dropped choice adds nothing: that token's weights are not made to sum to 1 again (Switch Transformer, Megatron; not so
DeepSpeed's top-2, which divides by what was kept). Padding is never taken. The load that balances the router is counted
before anything is dropped.
"""

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from meshwright.model.kinds.sizes import exact_share
from meshwright.parallel.collectives import gather
from meshwright.parallel.mesh import Axis
from meshwright.parallel.where import Where

LEVELS = 4096
"""As rounding moves a ranking in fp32 by a millionth of their range, equal ones fall on two levels once in hundreds."""
_ROUNDING = 64


def capacity_of(tokens: Int[Tensor, " b"], factor: float, top_k: int, num_experts: int) -> Int64[Tensor, " b"]:
    """Return how many choices each expert takes of sequences with so many counted tokens; exact in whole numbers."""
    share = exact_share(factor) * top_k / num_experts
    return (-(-tokens.to(torch.int64) * share.numerator // share.denominator)).clamp(min=1)


def within_capacity(
    expert: Int64[Tensor, "s b k"],
    counted: Bool[Tensor, "s b"],
    position: Int64[Tensor, " s"],
    capacity: Int64[Tensor, " b"],
    num_experts: int,
) -> Bool[Tensor, "s b k"]:
    """Say for each choice of whole sequences whether its expert takes it; tokens may come in any order."""
    by_position = torch.argsort(position)
    taken = torch.empty_like(expert, dtype=torch.bool)
    taken[by_position] = _first_come(expert[by_position], counted[by_position], capacity, num_experts)
    return taken


def taken_choices(
    expert: Int64[Tensor, "s_held b k"], where: Where, token: Axis, *, factor: float, num_experts: int
) -> Bool[Tensor, "s_held b k"]:
    """Say for each choice of the tokens held here whether its expert takes it.

    `token` is the axis over which the tokens of one sequence lie: everyone's choices are gathered, so that all ranks
    find the same.
    """
    s, b, top_k = expert.shape
    capacity = capacity_of(where.sequence_tokens, factor, top_k, num_experts)
    columns = (where.position[:, None], where.counted.to(torch.int64), expert.flatten(1))
    whole = gather(torch.cat(columns, dim=1), token)
    position, counted, chosen = torch.split(whole, [1, b, b * top_k], dim=1)
    taken = within_capacity(chosen.view(-1, b, top_k), counted.bool(), position[:, 0], capacity, num_experts)
    return taken[token.rank * s : (token.rank + 1) * s]


def _first_come(
    expert: Int64[Tensor, "s b k"], counted: Bool[Tensor, "s b"], capacity: Int64[Tensor, " b"], num_experts: int
) -> Bool[Tensor, "s b k"]:
    b = expert.shape[1]
    nobody = b * num_experts
    queue = torch.arange(b, device=expert.device)[None, :, None] * num_experts + expert
    queue = torch.where(counted[..., None], queue, nobody).flatten()
    # Sorted by sequence and expert, and within by position: a choice's place in its queue is how far it is from its
    # queue's beginning.
    order = torch.argsort(queue, stable=True)
    lengths = torch.bincount(queue, minlength=nobody + 1)
    begins = lengths.cumsum(0) - lengths
    place = torch.empty_like(queue)
    place[order] = torch.arange(queue.numel(), device=queue.device) - begins[queue[order]]
    room = torch.cat((capacity.repeat_interleave(num_experts), capacity.new_zeros(1)))
    return (place < room[queue]).view(expert.shape)


def first_tokens(
    ranking: Float[Tensor, "s b *e"], counted: Bool[Tensor, "s b"], number: Int64[Tensor, " b"]
) -> Bool[Tensor, "s b *e"]:
    """Say for each sequence (and expert) which `number` of its counted tokens rank highest; ties go to the earlier.

    Tokens rank by levels, of which there are 4096 over the middle nine tenths of a sequence's rankings: one that lies
    far out moves none of the others. Equal tokens at equal places have equal rankings, such as the first words of all
    documents of a sample that are kept apart. But a product rounds by where a row stands among the others, so that
    micro-batches and ranks would let other tokens of these through.
    """
    is_counted = counted.view(*counted.shape, *[1] * (ranking.dim() - 2))
    level = _levels(ranking, is_counted).masked_fill(~is_counted, -torch.inf)
    order = level.sort(dim=0, descending=True, stable=True).indices
    place = torch.arange(len(ranking), device=ranking.device).view(-1, *[1] * (ranking.dim() - 1))
    rank = torch.empty_like(order).scatter_(0, order, place.expand_as(order))
    return (rank < number.view(1, -1, *[1] * (ranking.dim() - 2))) & is_counted


def _levels(ranking: Tensor, is_counted: Tensor) -> Tensor:
    """Return rankings as whole numbers of steps, a step being a 4096th of what lies between the outer twentieths."""
    ascending = ranking.masked_fill(~is_counted, torch.inf).sort(dim=0).values
    last = (is_counted.sum(0, keepdim=True) - 1).clamp(min=0)
    outer = last // 20
    low, high = (ascending.gather(0, at.expand(1, *ranking.shape[1:])) for at in (outer, last - outer))
    info = torch.finfo(ranking.dtype)
    # Where all are equal, what is between them is rounding alone.
    rounding = _ROUNDING * info.eps * torch.maximum(low.abs(), high.abs())
    step = torch.maximum((high - low) / LEVELS, rounding).clamp(min=info.tiny)
    return torch.where(step.isfinite(), ((ranking - low) / step).round(), ranking)
