"""A mixture of experts: router, exchange, experts, and perhaps an expert that all tokens share.

    x [s, b, h] --router--> experts and weights [t, k] --dispatch--> rows of this rank's experts [r, h]
    rows --grouped SwiGLU--> rows --combine--> y [s, b, h] (+ shared expert(x))

Dropless: every token reaches each of its experts, however uneven the load. A rank holds e/ep neighbouring
experts, stacked; one grouped product serves all of them.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from meshwright.kernels.grouped import grouped_linear
from meshwright.kernels.swiglu import swiglu
from meshwright.model.feedforward.mlp import Mlp
from meshwright.model.routers.balance import (
    choices_per_sequence,
    sequence_balance_loss,
    step_balance_loss,
    z_loss,
)
from meshwright.model.routers.topk import Routing, TopKRouter
from meshwright.parallel.experts import combine, dispatch
from meshwright.parallel.initialise import ZEROS, InitPolicy, InitRule
from meshwright.parallel.mesh import Axis
from meshwright.parallel.placement import Placement, Split
from meshwright.parallel.tally import Tally, attach_loss
from meshwright.parallel.where import Where

NO_AXIS = Axis("ep")


class Experts(nn.Module):
    """This rank's experts, each a SwiGLU feed-forward; matrices of one kind are stacked [e/ep, out, in]."""

    def __init__(
        self,
        hidden_size: int,
        expert_hidden_size: int,
        num_experts: int,
        *,
        ep: Axis = NO_AXIS,
        bias: bool = False,
        init: InitPolicy | None = None,
    ) -> None:
        """Take global sizes; hold 1/ep of the experts.

        Raises:
            ValueError: if ep does not divide the experts.
        """
        super().__init__()
        if num_experts % ep.size != 0:
            raise ValueError(f"num_experts = {num_experts} does not divide by ep = {ep.size}")
        e_local, h, f = num_experts // ep.size, hidden_size, expert_hidden_size
        self.ep, init = ep, init or InitPolicy()
        self.rules = {"gate": init.matrix(h, f), "up": init.matrix(h, f)}
        self.rules["down"] = init.matrix(f, h, to_residual=True)
        self.gate = nn.Parameter(torch.empty(e_local, f, h))
        self.up = nn.Parameter(torch.empty(e_local, f, h))
        self.down = nn.Parameter(torch.empty(e_local, h, f))
        self.gate_bias = nn.Parameter(torch.empty(e_local, f)) if bias else None
        self.up_bias = nn.Parameter(torch.empty(e_local, f)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(e_local, h)) if bias else None
        if bias:
            self.rules |= {"gate_bias": ZEROS, "up_bias": ZEROS, "down_bias": ZEROS}

    def placements(self) -> dict[str, Placement]:
        """Say that every stack is cut over ep, along the experts."""
        return {name: Placement((Split(0, self.ep),), factorisation="expert") for name in self.rules}

    def init_rules(self) -> dict[str, InitRule]:
        """Say how each parameter begins."""
        return self.rules

    def forward(self, rows: Float[Tensor, "r h"], counts: Int64[Tensor, " e_local"]) -> Float[Tensor, "r h"]:
        """Apply each expert to its stretch of rows."""
        gate = _add_bias(grouped_linear(rows, self.gate, counts), self.gate_bias, counts)
        up = _add_bias(grouped_linear(rows, self.up, counts), self.up_bias, counts)
        return _add_bias(grouped_linear(swiglu(gate, up), self.down, counts), self.down_bias, counts)


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
        load_balancing: str = "sequence",
        load_balancing_weight: float = 0.0,
        z_loss_weight: float = 0.0,
    ) -> None:
        """Compose the parts; `name` is the layer's global name, under which load and losses are tallied."""
        super().__init__()
        self.name, self.num_experts = name, router.weight.shape[0]
        self.router, self.experts, self.shared = router, experts, shared
        self.load_balancing = load_balancing
        self.load_balancing_weight, self.z_loss_weight = load_balancing_weight, z_loss_weight
        if load_balancing == "step":
            self.register_buffer("previous_share", torch.empty(self.num_experts))

    def reset_buffers(self) -> None:
        """Begin as if every expert had had the same share of the step before the first."""
        if self.load_balancing == "step":
            self.previous_share.fill_(1.0 / self.num_experts)

    def tally_entries(self) -> dict[str, int]:
        """Declare the sums that this layer adds to a step's tally."""
        return {f"{self.name}.load": self.num_experts, f"{self.name}.balance": 1, f"{self.name}.z": 1}

    def finish_step(self, sums: dict[str, Tensor]) -> None:
        """Take the step's global load, once it is known, as what the next step's loss counts with."""
        if self.load_balancing == "step":
            load = sums[f"{self.name}.load"]
            self.previous_share.copy_(load / load.sum().clamp(min=1.0))

    def forward(self, x: Float[Tensor, "s b h"], where: Where, tally: Tally | None) -> Float[Tensor, "s b h"]:
        """Send each token through its experts; attach the router's losses and count its load when training."""
        tokens = x.flatten(0, 1)
        # Recomputed scores could round otherwise and send a token elsewhere than to the expert whose gradient is due.
        routing: Routing = self.router(tokens, lambda choose: where.decide(f"experts/{id(self)}", choose))
        if self.training and tally is not None:
            tokens = self._attach_losses(tokens, routing, where, tally)
        return self._experts_and_shared(tokens, routing).view_as(x)

    def initial_state(self, batch: int, max_len: int) -> None:
        """Return nothing: tokens do not see each other here."""

    def step(self, x: Float[Tensor, "s b h"], state: None) -> Float[Tensor, "s b h"]:
        """Compute the next tokens."""
        tokens = x.flatten(0, 1)
        return self._experts_and_shared(tokens, self.router(tokens)).view_as(x)

    def _experts_and_shared(self, tokens: Tensor, routing: Routing) -> Tensor:
        ep = self.experts.ep
        rows, plan = dispatch(tokens, routing.expert, self.num_experts, ep)
        y = combine(self.experts(rows, plan.counts), routing.weight, plan, ep)
        return y if self.shared is None else y + self.shared(tokens)

    def _attach_losses(self, tokens: Tensor, routing: Routing, where: Where, tally: Tally) -> Tensor:
        s, b = where.counted.shape
        probability = routing.probability.view(s, b, -1)
        choices = choices_per_sequence(routing.expert.view(s, b, -1), where.counted, self.num_experts)
        tally.add(f"{self.name}.load", choices.sum(0))
        if self.load_balancing != "none":
            if self.load_balancing == "step":
                loss = step_balance_loss(probability, self.previous_share, where.counted, step_tokens=where.step_tokens)
            else:
                loss = sequence_balance_loss(
                    probability, choices, where.counted, top_k=self.router.top_k, step_tokens=where.step_tokens
                )
            tally.add(f"{self.name}.balance", loss)
            tokens = attach_loss(tokens, loss * self.load_balancing_weight)
        z = z_loss(routing.scores.view(s, b, -1), where.counted, step_tokens=where.step_tokens)
        tally.add(f"{self.name}.z", z)
        return attach_loss(tokens, z * self.z_loss_weight)


def _add_bias(rows: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    """Add to each row the bias of its expert; by a product, whose gradient sums rows in a fixed order."""
    if bias is None:
        return rows
    expert = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    one_hot = torch.nn.functional.one_hot(expert, len(counts)).to(bias.dtype)
    return rows + (one_hot @ bias).to(rows.dtype)
