"""This rank's experts, each a feed-forward: matrices of one kind are stacked, and one grouped product serves all.

    rows [r, h], sorted by expert --gate, up--> f(gate) * up [r, f] --down--> [r, h]        plain units have no gate

A rank holds e/ep neighbouring experts. With expert tensor parallelism it holds f/etp of each, and the ranks of etp
compute each other's rows:

    rows [r, h] --share_rows--> everyone's rows [R, h] --gate, up, down--> partial sums [R, h] --return_rows--> [r, h]

Dropout, in training, is of what stands between the products, as in Switch Transformer ("expert dropout"): drawn by
step, sample, position and expert, wherever the row is computed.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from meshwright.kernels.limits import Limits
from meshwright.kernels.matmul.grouped import grouped_linear
from meshwright.kernels.matmul.linear import linear
from meshwright.model.feedforward.mlp import SWIGLU, Activation, Inner
from meshwright.parallel.dropout import RowsOf, dropout_of_rows
from meshwright.parallel.experts.exchange import AllToAll, return_rows, share_rows
from meshwright.parallel.fits import check_share, check_sizes
from meshwright.parallel.initialise import ZEROS, InitPolicy, InitRule
from meshwright.parallel.mesh import NO_EP, NO_ETP, Axis
from meshwright.parallel.placement import Placement, Split, partial_over
from meshwright.parallel.tensor.linear import divide


@runtime_checkable
class Exchange(Protocol):
    """How tokens come to the ranks of their experts, and back."""

    def send(
        self, x: Tensor, expert: Tensor, weight: Tensor, taken: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Any]:
        """Return this rank's rows by expert, how many each expert has, and what is needed to bring them back."""

    def bring_back(self, rows: Tensor, sent: Any) -> Tensor:
        """Return each token's weighted sum of its experts' rows."""


class RowTokens(NamedTuple):
    """What dropout in the experts draws by: which token each row is of."""

    sample_position: Int64[Tensor, "r 2"]
    key: tuple[int, int]
    step: int
    limits: Limits


class Experts(nn.Module):
    """e/ep feed-forwards of inner width f/etp, [e/ep, f/etp, h]."""

    def __init__(
        self,
        hidden_size: int,
        expert_hidden_size: int,
        num_experts: int,
        inner: Inner = SWIGLU,
        *,
        ep: Axis = NO_EP,
        etp: Axis = NO_ETP,
        init: InitPolicy | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        """Take global sizes; hold 1/ep of the experts, and 1/etp of each.

        `exchange` brings tokens to their experts and back over ep, by an all-to-all if it is not given.

        Raises:
            ValueError: if ep does not divide the experts, or etp their width, or the exchange cannot do what is asked.
        """
        super().__init__()
        widths = {"hidden_size": hidden_size, "expert_hidden_size": expert_hidden_size}
        check_sizes(widths | {"num_experts": num_experts})
        check_share("dropout", inner.dropout)
        e_local = divide(num_experts, ep.size, what="num_experts", by=ep.name)
        h, f = hidden_size, divide(expert_hidden_size, etp.size, what="expert_hidden_size", by=etp.name)
        self.ep, self.etp, init = ep, etp, init or InitPolicy()
        self.inner, self.width, self.hidden_size, self.num_experts = inner, expert_hidden_size, h, num_experts
        self.exchange = exchange or AllToAll(num_experts, ep)
        if inner.dropout and not isinstance(self.exchange, AllToAll):
            raise ValueError(f"expert dropout = {inner.dropout} needs whole numbers exchanged: all_to_all would fit")
        inward = init.matrix(h, expert_hidden_size, is_value=True)
        self.activation = Activation(inner.activation)
        inwards = ("gate", "up") if self.activation.is_gated else ("up",)
        self.rules = dict.fromkeys(inwards, inward) | {"down": init.matrix(expert_hidden_size, h, to_residual=True)}
        if inner.bias:
            self.rules |= {f"{name}_bias": ZEROS for name in self.rules}
        self.gate = nn.Parameter(torch.empty(e_local, f, h)) if self.activation.is_gated else None
        self.up = nn.Parameter(torch.empty(e_local, f, h))
        self.down = nn.Parameter(torch.empty(e_local, h, f))
        self.gate_bias = nn.Parameter(torch.empty(e_local, f)) if "gate_bias" in self.rules else None
        self.up_bias = nn.Parameter(torch.empty(e_local, f)) if inner.bias else None
        self.down_bias = nn.Parameter(torch.empty(e_local, h)) if inner.bias else None

    def placements(self) -> dict[str, Placement]:
        """Say that every stack is cut over ep, along the experts, and over etp, along their inner width."""
        of_experts = Split(0, self.ep)
        wide = Placement((of_experts, Split(1, self.etp)), factorisation="expert")
        table = dict.fromkeys(("gate", "up", "gate_bias", "up_bias"), wide)
        table["down"] = Placement((of_experts, Split(2, self.etp)), factorisation="expert")
        table["down_bias"] = Placement((of_experts,), grad_sum=partial_over(self.etp), factorisation="expert")
        return table

    def init_rules(self) -> dict[str, InitRule]:
        """Say how each parameter begins."""
        return self.rules

    def forward(
        self, rows: Float[Tensor, "r h"], counts: Int64[Tensor, " e_local"], tokens: RowTokens | None = None
    ) -> Float[Tensor, "r h"]:
        """Apply each expert to its stretch of rows; dropout is drawn where `tokens` says which rows they are."""
        shared = share_rows(rows, counts, self.etp)
        inner = self.activation(
            *(
                _add_bias(grouped_linear(shared.rows, weight, shared.counts), bias, shared.counts)
                for weight, bias in self._inwards()
            )
        )
        if tokens is not None:
            places = share_rows(tokens.sample_position, counts, self.etp).rows
            inner = self._dropped(inner, places, shared.counts, tokens)
        y = return_rows(grouped_linear(inner, self.down, shared.counts), shared, self.etp)
        return _add_bias(y, self.down_bias, counts)  # after the sum over etp, so once

    def takes_one_by_one(self, x: Float[Tensor, "t h"], expert: Int64[Tensor, "t k"]) -> bool:
        """Say whether so few rows are better not sorted: in a step of generation on a CPU most experts have none."""
        few = 0 < expert.numel() < self.num_experts and not (self.ep.is_split or self.etp.is_split)
        return few and not (x.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling())

    def one_by_one(
        self, x: Float[Tensor, "t h"], expert: Int64[Tensor, "t k"], weight: Float[Tensor, "t k"]
    ) -> Float[Tensor, "t h"]:
        """Return each token's weighted sum of its experts, all of which are here, without dropout."""
        rows = [
            self._one(token, chosen)
            for token, chosen_ones in zip(x[:, None].unbind(), expert.tolist(), strict=True)
            for chosen in chosen_ones
        ]
        of_token = torch.cat(rows).view(*expert.shape, -1)
        return (of_token * weight[..., None].to(of_token.dtype)).sum(1)

    def _one(self, row: Tensor, at: int) -> Tensor:
        inner = self.activation(*(linear(row, w[at], b if b is None else b[at]) for w, b in self._inwards()))
        return linear(inner, self.down[at], self.down_bias if self.down_bias is None else self.down_bias[at])

    def _inwards(self) -> list[tuple[Tensor, Tensor | None]]:
        gate = [] if self.gate is None else [(self.gate, self.gate_bias)]
        return [*gate, (self.up, self.up_bias)]

    def _dropped(self, inner: Tensor, places: Tensor, counts: Tensor, tokens: RowTokens) -> Tensor:
        first = self.ep.rank * len(counts)
        expert = torch.arange(first, first + len(counts), device=inner.device).repeat_interleave(counts)
        sample, position = places.unbind(1)
        first_feature = self.etp.rank * inner.shape[1]
        rows = RowsOf(tokens.key, tokens.step, sample, position, expert, first_feature, self.width, tokens.limits)
        return dropout_of_rows(inner, self.inner.dropout, rows)


def _add_bias(rows: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    """Add to each row the bias of its expert; by a product, whose gradient sums rows in a fixed order."""
    if bias is None:
        return rows
    expert = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    one_hot = torch.nn.functional.one_hot(expert, len(counts)).to(bias.dtype)
    return rows + (one_hot @ bias).to(rows.dtype)
