"""A mixture of experts: router, exchange, experts, and perhaps an expert that all tokens share.

    x [s, b, h] --router--> experts and weights [s, b, k] --dispatch--> rows of this rank's experts [r, h]
    rows --grouped products--> rows --combine--> y [s, b, h] (+ shared expert(x), which may have a gate of its own)

Dropless: every token reaches each of its experts, however uneven the load; unless there is a capacity, with which an
expert takes no more of a sequence in training (model/routers/capacity.py), or the experts choose themselves
(model/routers/expert_choice.py). A step of inference drops nothing, and keeps where its tokens went.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from meshwright.kernels.precision import at_least_fp32
from meshwright.model.config import ModelConfig
from meshwright.model.feedforward.experts import Experts, RowTokens
from meshwright.model.feedforward.mlp import Inner, Mlp
from meshwright.model.kinds.feedforward.moe import MOST_CAPACITY, NEVER_NORMALISED
from meshwright.model.making import Making
from meshwright.model.routers.balance import (
    choices_per_sequence,
    sequence_balance_loss,
    step_balance_loss,
    z_loss,
)
from meshwright.model.routers.capacity import taken_choices
from meshwright.model.routers.expert_choice import ExpertChoiceRouter
from meshwright.model.routers.router import Router, Routing, Ways
from meshwright.model.routers.table import make_router
from meshwright.model.routing_record import RoutingRecord, empty_record
from meshwright.model.wide_buffers import WideBuffers
from meshwright.parallel.collectives import all_reduce
from meshwright.parallel.counter_rng import stream_key
from meshwright.parallel.experts.deep_ep import DeepEpExchange
from meshwright.parallel.experts.exchange import AllToAll
from meshwright.parallel.fits import check_known, check_not_below_zero
from meshwright.parallel.initialise import InitPolicy, InitRule
from meshwright.parallel.mesh import NO_TP, Axis
from meshwright.parallel.placement import Placement, partial_over
from meshwright.parallel.tally import Tally, attach_loss
from meshwright.parallel.where import Where


@dataclass(frozen=True)
class RouterLosses:
    """Which losses keep a router in order, and how strongly; the weights are of the run's total loss."""

    load_balancing: Literal["sequence", "step", "none"] = "sequence"
    load_balancing_weight: float = 0.0
    z_loss_weight: float = 0.0

    def check(self) -> None:
        """Hold each to what it can be.

        Raises:
            ValueError: naming what it is not.
        """
        check_known("load_balancing", [self.load_balancing], ("sequence", "step", "none"))
        check_not_below_zero("load_balancing_weight", self.load_balancing_weight)
        check_not_below_zero("z_loss_weight", self.z_loss_weight)


class SharedGate(nn.Module):
    """How much of the shared expert a token takes: sigmoid(x w) (Qwen2Moe, Qwen3Next `shared_expert_gate`)."""

    def __init__(self, hidden_size: int, *, init: InitPolicy | None = None, tp: Axis = NO_TP) -> None:
        """Take the width; each rank of `tp` sees other tokens."""
        super().__init__()
        self.tp, self.rule = tp, (init or InitPolicy()).matrix(hidden_size, 1)
        self.weight = nn.Parameter(torch.empty(1, hidden_size))

    def placements(self) -> dict[str, Placement]:
        """Say that the weight is whole, and its gradient the sum of the ranks'."""
        return {"weight": Placement(grad_sum=partial_over(self.tp))}

    def init_rules(self) -> dict[str, InitRule]:
        """Say how each parameter begins."""
        return {"weight": self.rule}

    def forward(self, x: Float[Tensor, "s b h"]) -> Float[Tensor, "s b 1"]:
        """Return a number from 0 to 1 for each token, in at least fp32."""
        with torch.autocast(x.device.type, enabled=False):
            return (at_least_fp32(x) @ at_least_fp32(self.weight).T).sigmoid()


class Moe(WideBuffers):
    """Routed experts, and optionally one that every token goes to."""

    previous_share: Tensor

    def __init__(
        self,
        router: Router,
        experts: Experts,
        *,
        shared: Mlp | None = None,
        shared_gate: SharedGate | None = None,
        losses: RouterLosses | None = None,
        capacity_factor: float = 0.0,
    ) -> None:
        """Compose the parts; load and losses are tallied under the router's name, the layer's global one.

        Raises:
            ValueError: if the parts do not go together.
        """
        super().__init__()
        if capacity_factor and isinstance(router, ExpertChoiceRouter):
            raise ValueError(
                f"capacity_factor = {capacity_factor}: experts that choose take top_k * tokens / experts; leave it out"
            )
        if shared_gate is not None and shared is None:
            raise ValueError("a gate of the shared expert needs a shared expert")
        if not 0.0 <= capacity_factor <= MOST_CAPACITY:
            rule = f"must be from 0, which turns it off, to {MOST_CAPACITY:g}; 1.25 would fit"
            raise ValueError(f"capacity_factor = {capacity_factor}: {rule}")
        _check_sizes_agree(router, experts)
        self.capacity_factor = capacity_factor
        self.name, self.num_experts, self.token = router.name, router.num_experts, router.token
        self.router, self.experts, self.shared, self.shared_gate = router, experts, shared, shared_gate
        self.losses = losses or RouterLosses()
        self.losses.check()
        if self.losses.load_balancing == "step":
            self.register_buffer("previous_share", torch.empty(self.num_experts, dtype=torch.float32))

    def reset_buffers(self) -> None:
        """Begin as if every expert had had the same share of the step before the first."""
        if self.losses.load_balancing == "step":
            self.previous_share.fill_(1.0 / self.num_experts)

    def tally_entries(self) -> dict[str, int]:
        """Declare the sums that this layer adds to a step's tally."""
        entries = {f"{self.name}.load": self.num_experts, f"{self.name}.balance": 1, f"{self.name}.z": 1}
        can_drop = self.capacity_factor or isinstance(self.router, ExpertChoiceRouter)
        return entries | ({f"{self.name}.dropped": 1, f"{self.name}.droppable": 1} if can_drop else {})

    def finish_step(self, sums: dict[str, Tensor]) -> None:
        """Take the step's global load, once it is known, as what the next step's loss counts with."""
        if self.losses.load_balancing == "step":
            load = sums[f"{self.name}.load"]
            self.previous_share.copy_(load / load.sum().clamp(min=1.0))

    def forward(self, x: Float[Tensor, "s b h"], where: Where, tally: Tally | None) -> Float[Tensor, "s b h"]:
        """Send each token through its experts; attach the router's losses and count its load when training.

        Without a tally there are no losses and no load: nothing balances the experts then, by gradient or by bias.
        """
        routing: Routing = self.router(x, where)
        taken = routing.taken
        if self.training and self.capacity_factor:
            taken = self._within_capacity(routing.expert, where)
        if self.training and tally is not None:
            x = self._attach_losses(x, routing, where, tally)
            self._count_dropped(taken, routing, where, tally)
        return self._experts_and_shared(x, routing._replace(taken=taken), where)

    def initial_state(self, batch: int, max_len: int | None = None) -> RoutingRecord:
        """Return an empty record for `batch` samples of at most `max_len` tokens (None: it grows)."""
        return empty_record(batch, max_len, (self.router.most_choices,), self.router.weight)

    def step(self, x: Float[Tensor, "s b h"], state: RoutingRecord) -> Float[Tensor, "s b h"]:
        """Compute the next tokens; nothing is dropped, because nobody knows yet how many there will be."""
        if state.is_replayed:
            return self._experts_and_shared(x, state.again(x), None)
        routing: Routing = self.router(x)
        state.add(routing.expert, routing.weight, routing.taken)
        return self._experts_and_shared(x, routing, None)

    def _within_capacity(self, expert: Tensor, where: Where) -> Tensor:
        """Return which choices their experts have room for."""

        def choose() -> Tensor:
            factor, num_experts = self.capacity_factor, self.num_experts
            return taken_choices(expert, where, self.token, factor=factor, num_experts=num_experts)

        return where.decide(f"taken/{id(self)}", choose)

    def _count_dropped(self, taken: Tensor | None, routing: Routing, where: Where, tally: Tally) -> None:
        """Count what was dropped, and of how many: choices beyond the capacity, or tokens that no expert chose."""
        if taken is None:
            return
        served = taken.any(-1, keepdim=True) if routing.taken is not None else taken
        tally.add(f"{self.name}.dropped", (where.counted[..., None] & ~served).sum())
        tally.add(f"{self.name}.droppable", where.counted.sum() * served.shape[-1])

    def _experts_and_shared(self, x: Tensor, routing: Routing, where: Where | None) -> Tensor:
        y = self._of_experts(x.flatten(0, 1), routing.flat(), where).view_as(x)
        if self.shared is None:
            return y
        shared: Tensor = self.shared(x, where) if where is not None else self.shared.step(x, None)
        if self.shared_gate is not None:
            shared = self.shared_gate(x).to(shared.dtype) * shared
        return y + shared

    def _of_experts(self, tokens: Tensor, flat: Routing, where: Where | None) -> Tensor:
        if flat.taken is None and where is None and self.experts.takes_one_by_one(tokens, flat.expert):
            return self.experts.one_by_one(tokens, flat.expert, flat.weight)
        rows, counts, sent = self.experts.exchange.send(tokens, flat.expert, flat.weight, flat.taken)
        drawn = None
        if self.training and where is not None and self.experts.inner.dropout:
            drawn = self._row_tokens(flat, where)
        return self.experts.exchange.bring_back(self.experts(rows, counts, drawn), sent)

    def _row_tokens(self, flat: Routing, where: Where) -> RowTokens:
        """Send with the tokens which ones they are, so that an expert draws by the token and not by its rank."""
        shape = where.counted.shape
        places = torch.stack((where.sample[None].expand(shape), where.position[:, None].expand(shape)), dim=-1)
        rows, _, _ = self.experts.exchange.send(places.flatten(0, 1), flat.expert, flat.weight, flat.taken)
        key = stream_key(where.seed, where.draw_name(f"{self.name}/expert_dropout"))
        return RowTokens(rows, key, where.step, where.limits)

    def _attach_losses(self, x: Tensor, routing: Routing, where: Where, tally: Tally) -> Tensor:
        choices = choices_per_sequence(routing.expert, where.counted, self.num_experts, routing.taken)
        tally.add(f"{self.name}.load", choices.sum(0))
        self.router.count(routing, where, tally)
        if self.losses.load_balancing != "none":
            loss = self._balance(routing.probability, choices, where)
            tally.add(f"{self.name}.balance", loss)
            x = attach_loss(x, loss * self.losses.load_balancing_weight)
        z = z_loss(routing.scores, where.counted, step_tokens=where.step_tokens)
        tally.add(f"{self.name}.z", z)
        return attach_loss(x, z * self.losses.z_loss_weight)

    def _balance(self, probability: Tensor, choices: Int64[Tensor, "b e"], where: Where) -> Tensor:
        if self.losses.load_balancing == "step":
            return step_balance_loss(probability, self.previous_share, where.counted, step_tokens=where.step_tokens)
        return sequence_balance_loss(
            probability,
            self._of_whole_sequences(choices, where),
            where.counted,
            sequence_tokens=where.sequence_tokens,
            top_k=self.router.top_k,
            step_tokens=where.step_tokens,
        )

    def _of_whole_sequences(self, choices: Tensor, where: Where) -> Tensor:
        """Return how often each expert was chosen in each sequence, over all ranks that share it."""
        if not self.token.is_split:
            return choices

        def summed() -> Tensor:
            whole = choices.clone()
            all_reduce(whole, self.token)
            return whole

        return where.decide(f"choices/{id(self)}", summed)


def _check_sizes_agree(router: Router, experts: Experts) -> None:
    sizes = {
        "num_experts": (router.num_experts, experts.num_experts),
        "hidden_size": (router.weight.shape[1], experts.hidden_size),
    }
    if wrong := [
        f"{name} = {of_router} of the router: must be that of the experts, {of_experts}"
        for name, (of_router, of_experts) in sizes.items()
        if of_router != of_experts
    ]:
        raise ValueError("\n".join(wrong))


def make(config: ModelConfig, making: Making) -> Moe:
    """Return the mixture of experts, of which this rank holds 1/(ep * etp)."""
    moe, h = config.moe, config.hidden_size
    assert moe is not None, "the checks let no E pass without a [model.moe]"
    mesh, init, name = making.mesh, making.init, making.layer
    inner = Inner(config.ffn_activation, "ffn" in config.bias, config.ffn_dropout)
    shared = shared_gate = None
    if moe.num_shared_experts:
        shared = Mlp(h, moe.shared_hidden_size, inner, name=f"{name}.shared", init=init, tp=mesh.tp)
    if moe.shared_expert_gate:
        shared_gate = SharedGate(h, init=init, tp=mesh.tp)
    way = {"all_to_all": AllToAll, "deep_ep": DeepEpExchange}[making.ways.expert_exchange]
    sizes, exchange = (h, moe.expert_hidden_size, moe.num_experts), way(moe.num_experts, mesh.ep)
    of_expert = inner._replace(dropout=moe.expert_dropout)
    normalise = None if moe.router in NEVER_NORMALISED else moe.normalise_top_k
    ways = Ways(normalise, moe.weight_scale, moe.num_groups, moe.top_groups, moe.bias_rate, moe.router_jitter)
    sizes_of_router = (h, moe.num_experts, moe.top_k, ways)
    return Moe(
        make_router(moe.router, *sizes_of_router, name=name, init=init, tp=mesh.tp, token=mesh.token),
        Experts(*sizes, of_expert, ep=mesh.ep, etp=mesh.etp, init=init, exchange=exchange),
        shared=shared,
        shared_gate=shared_gate,
        losses=RouterLosses(moe.load_balancing, moe.load_balancing_weight, moe.z_loss_weight),
        capacity_factor=moe.capacity_factor,
    )
