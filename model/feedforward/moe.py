"""A mixture of experts: router, exchange, experts, and perhaps an expert that all tokens share.

    x [s, b, h] --router--> experts and weights [t, k] --dispatch--> rows of this rank's experts [r, h]
    rows --grouped SwiGLU--> rows --combine--> y [s, b, h] (+ shared expert(x))

Dropless: every token reaches each of its experts, however uneven the load; unless there is a capacity, with which an
expert takes no more of a sequence in training (model/routers/capacity.py). A rank holds e/ep neighbouring
experts, stacked; one grouped product serves all of them. With expert tensor parallelism it holds f/etp of each, and
the ranks of etp compute each other's rows:

    rows [r, h] --share_rows--> everyone's rows [R, h] --gate, up, down--> partial sums [R, h] --return_rows--> [r, h]
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from meshwright.kernels.grouped import grouped_linear
from meshwright.kernels.precision import at_least_fp32
from meshwright.model.feedforward.mlp import Mlp, SwiGlu
from meshwright.model.routers.balance import (
    choices_per_sequence,
    sequence_balance_loss,
    step_balance_loss,
    z_loss,
)
from meshwright.model.routers.capacity import taken_choices
from meshwright.model.routers.topk import Routing, TopKRouter
from meshwright.parallel.collectives import all_reduce
from meshwright.parallel.dropout import jitter
from meshwright.parallel.experts.exchange import AllToAll, return_rows, share_rows
from meshwright.parallel.initialise import ZEROS, InitPolicy, InitRule
from meshwright.parallel.mesh import NO_EP, NO_ETP, Axis
from meshwright.parallel.placement import Placement, Split, partial_over
from meshwright.parallel.tally import Tally, attach_loss
from meshwright.parallel.tensor.linear import divide
from meshwright.parallel.where import Where

NO_TOKEN = Axis("token")


@runtime_checkable
class Exchange(Protocol):
    """How tokens come to the ranks of their experts, and back."""

    def send(
        self, x: Tensor, expert: Tensor, weight: Tensor, taken: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Any]:
        """Return this rank's rows by expert, how many each expert has, and what is needed to bring them back."""

    def bring_back(self, rows: Tensor, sent: Any) -> Tensor:
        """Return each token's weighted sum of its experts' rows."""


class Experts(nn.Module):
    """This rank's experts, each a SwiGLU feed-forward; matrices of one kind are stacked, [e/ep, f/etp, h]."""

    def __init__(
        self,
        hidden_size: int,
        expert_hidden_size: int,
        num_experts: int,
        *,
        ep: Axis = NO_EP,
        etp: Axis = NO_ETP,
        bias: bool = False,
        init: InitPolicy | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        """Take global sizes; hold 1/ep of the experts, and 1/etp of each.

        `exchange` brings tokens to their experts and back over ep, by an all-to-all if it is not given.

        Raises:
            ValueError: if ep does not divide the experts, or etp their width.
        """
        super().__init__()
        e_local = divide(num_experts, ep.size, what="num_experts", by=ep.name)
        h, f = hidden_size, divide(expert_hidden_size, etp.size, what="expert_hidden_size", by=etp.name)
        self.ep, self.etp, init = ep, etp, init or InitPolicy()
        self.exchange = exchange or AllToAll(num_experts, ep)
        inward = init.matrix(h, expert_hidden_size)
        self.rules = {"gate": inward, "up": inward, "down": init.matrix(expert_hidden_size, h, to_residual=True)}
        self.activation = SwiGlu()
        self.gate = nn.Parameter(torch.empty(e_local, f, h))
        self.up = nn.Parameter(torch.empty(e_local, f, h))
        self.down = nn.Parameter(torch.empty(e_local, h, f))
        self.gate_bias = nn.Parameter(torch.empty(e_local, f)) if bias else None
        self.up_bias = nn.Parameter(torch.empty(e_local, f)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(e_local, h)) if bias else None
        if bias:
            self.rules |= {"gate_bias": ZEROS, "up_bias": ZEROS, "down_bias": ZEROS}

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

    def forward(self, rows: Float[Tensor, "r h"], counts: Int64[Tensor, " e_local"]) -> Float[Tensor, "r h"]:
        """Apply each expert to its stretch of rows."""
        shared = share_rows(rows, counts, self.etp)
        gate = _add_bias(grouped_linear(shared.rows, self.gate, shared.counts), self.gate_bias, shared.counts)
        up = _add_bias(grouped_linear(shared.rows, self.up, shared.counts), self.up_bias, shared.counts)
        inner = self.activation(gate, up)
        y = return_rows(grouped_linear(inner, self.down, shared.counts), shared, self.etp)
        return _add_bias(y, self.down_bias, counts)  # after the sum over etp, so once


@dataclass(frozen=True)
class RouterLosses:
    """Which losses keep a router in order, and how strongly; the weights are of the run's total loss."""

    load_balancing: Literal["sequence", "step", "none"] = "sequence"
    load_balancing_weight: float = 0.0
    z_loss_weight: float = 0.0


class Moe(nn.Module):
    """Routed experts, and optionally one that every token goes to."""

    previous_share: Tensor

    def __init__(
        self,
        router: TopKRouter,
        experts: Experts,
        *,
        name: str = "moe",
        shared: Mlp | None = None,
        losses: RouterLosses | None = None,
        capacity_factor: float = 0.0,
        router_jitter: float = 0.0,
        token: Axis = NO_TOKEN,
    ) -> None:
        """Compose the parts; `name` is the layer's global name, under which load and losses are tallied.

        `token` is the axis over which the tokens of one sequence lie, cp and tp together.
        """
        super().__init__()
        self.capacity_factor, self.router_jitter = capacity_factor, router_jitter
        self.name, self.num_experts = name, router.weight.shape[0]
        self.router, self.experts, self.shared = router, experts, shared
        self.losses, self.token = losses or RouterLosses(), token
        if self.losses.load_balancing == "step":
            self.register_buffer("previous_share", torch.empty(self.num_experts))

    def reset_buffers(self) -> None:
        """Begin as if every expert had had the same share of the step before the first."""
        if self.losses.load_balancing == "step":
            self.previous_share.fill_(1.0 / self.num_experts)

    def tally_entries(self) -> dict[str, int]:
        """Declare the sums that this layer adds to a step's tally."""
        entries = {f"{self.name}.load": self.num_experts, f"{self.name}.balance": 1, f"{self.name}.z": 1}
        return entries | ({f"{self.name}.dropped": 1} if self.capacity_factor else {})

    def finish_step(self, sums: dict[str, Tensor]) -> None:
        """Take the step's global load, once it is known, as what the next step's loss counts with."""
        if self.losses.load_balancing == "step":
            load = sums[f"{self.name}.load"]
            self.previous_share.copy_(load / load.sum().clamp(min=1.0))

    def forward(self, x: Float[Tensor, "s b h"], where: Where, tally: Tally | None) -> Float[Tensor, "s b h"]:
        """Send each token through its experts; attach the router's losses and count its load when training."""
        tokens = x.flatten(0, 1)
        # Recomputed scores could round otherwise and send a token elsewhere than to the expert whose gradient is due.
        routing: Routing = self.router(
            self._jittered(x, where).flatten(0, 1), lambda choose: where.decide(f"experts/{id(self)}", choose)
        )
        taken = self._taken(routing.expert, where) if self.training and self.capacity_factor else None
        if self.training and tally is not None:
            tokens = self._attach_losses(tokens, routing, where, tally)
            if taken is not None:
                tally.add(f"{self.name}.dropped", (where.counted.flatten()[:, None] & ~taken).sum())
        return self._experts_and_shared(tokens, routing, taken).view_as(x)

    def initial_state(self, batch: int, max_len: int) -> None:
        """Return nothing: tokens do not see each other here."""

    def step(self, x: Float[Tensor, "s b h"], state: None) -> Float[Tensor, "s b h"]:
        """Compute the next tokens; nothing is dropped, because nobody knows yet how many there will be."""
        tokens = x.flatten(0, 1)
        return self._experts_and_shared(tokens, self.router(tokens)).view_as(x)

    def _jittered(self, x: Tensor, where: Where) -> Tensor:
        """Return what the router sees: in training perhaps with each feature of each token a little off."""
        if not (self.training and self.router_jitter):
            return x
        return jitter(at_least_fp32(x), self.router_jitter, where=where, name=f"{self.name}/router_jitter")

    def _taken(self, expert: Tensor, where: Where) -> Tensor:
        """Return which choices their experts have room for."""

        def choose() -> Tensor:
            chosen = expert.view(*where.counted.shape, -1)
            factor, num_experts = self.capacity_factor, self.num_experts
            return taken_choices(chosen, where, self.token, factor=factor, num_experts=num_experts).flatten(0, 1)

        return where.decide(f"taken/{id(self)}", choose)

    def _experts_and_shared(self, tokens: Tensor, routing: Routing, taken: Tensor | None = None) -> Tensor:
        rows, counts, sent = self.experts.exchange.send(tokens, routing.expert, routing.weight, taken)
        y = self.experts.exchange.bring_back(self.experts(rows, counts), sent)
        return y if self.shared is None else y + self.shared(tokens)

    def _attach_losses(self, tokens: Tensor, routing: Routing, where: Where, tally: Tally) -> Tensor:
        s, b = where.counted.shape
        probability = routing.probability.view(s, b, -1)
        choices = choices_per_sequence(routing.expert.view(s, b, -1), where.counted, self.num_experts)
        tally.add(f"{self.name}.load", choices.sum(0))
        if self.losses.load_balancing != "none":
            if self.losses.load_balancing == "step":
                loss = step_balance_loss(probability, self.previous_share, where.counted, step_tokens=where.step_tokens)
            else:
                loss = sequence_balance_loss(
                    probability,
                    self._of_whole_sequences(choices, where),
                    where.counted,
                    sequence_tokens=where.sequence_tokens,
                    top_k=self.router.top_k,
                    step_tokens=where.step_tokens,
                )
            tally.add(f"{self.name}.balance", loss)
            tokens = attach_loss(tokens, loss * self.losses.load_balancing_weight)
        z = z_loss(routing.scores.view(s, b, -1), where.counted, step_tokens=where.step_tokens)
        tally.add(f"{self.name}.z", z)
        return attach_loss(tokens, z * self.losses.z_loss_weight)

    def _of_whole_sequences(self, choices: Tensor, where: Where) -> Tensor:
        """Return how often each expert was chosen in each sequence, over all ranks that share it."""
        if not self.token.is_split:
            return choices

        def summed() -> Tensor:
            whole = choices.clone()
            all_reduce(whole, self.token)
            return whole

        return where.decide(f"choices/{id(self)}", summed)


def _add_bias(rows: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    """Add to each row the bias of its expert; by a product, whose gradient sums rows in a fixed order."""
    if bias is None:
        return rows
    expert = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    one_hot = torch.nn.functional.one_hot(expert, len(counts)).to(bias.dtype)
    return rows + (one_hot @ bias).to(rows.dtype)
