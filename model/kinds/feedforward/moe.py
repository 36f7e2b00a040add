"""The mixture of experts: its table [model.moe] and its description (module: feedforward/moe.py).

    router [e, h]   experts.gate, .up [e, f, h]   experts.down [e, h, f]   shared.* as an MLP of its width
    router.noise_weight [e, h] of a noisy one   no gate with a plain activation   shared_gate [1, h] where asked for

Kept for each token: h/tp of the norm's input and, for the router, h/tp of its output in at least fp32, with e/tp scores
and e/tp probabilities (of a noisy one as many of the noise and its scale); rows: each token comes top_k times, also
where experts choose, h of input, h of result, 3f between (2f with a plain activation); as an MLP for shared experts,
and h/tp of their result if they have a gate. Rows lie wherever they were routed: a rank has its share of them on
average, times etp where they are shared, and more when routing is uneven; a capacity below 1 leaves so many of them at
most. Of each choice the expert, where its row stands and where it came from, of eight bytes each, and its weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat
from pydantic import model_validator as validator

from meshwright.model.kinds.feedforward.mlp import inwards, mlp_kept, mlp_weights
from meshwright.model.kinds.kept import norm_inputs, normed_input
from meshwright.model.kinds.kind import (
    EXPERT_OUTPUTS,
    OVER_EXPERTS,
    Choose,
    Degrees,
    Kind,
    Named,
    Need,
    Types,
    Weight,
    matrix,
)
from meshwright.model.kinds.sizes import TABLE, Size, SizeOrZero
from meshwright.model.kinds.small import ALIGNED
from meshwright.parallel.fits import divisors, nearest, up_to

if TYPE_CHECKING:
    from meshwright.model.config import ModelConfig
    from meshwright.model.kinds.small import Small


RouterKind = Literal["softmax", "sigmoid", "switch", "sinkhorn", "expert_choice", "noisy"]
BALANCED_WITHOUT_LOSS = ("sigmoid", "sinkhorn", "expert_choice")
MOST_CAPACITY = 1024.0
NEVER_NORMALISED = ("switch", "sinkhorn", "expert_choice")
# How many of a group's experts its score is the sum of.
BEST_OF_GROUP = {"softmax": 1, "sigmoid": 2}


class MoeConfig(BaseModel):
    """The mixture of experts that stands at each `E` of the pattern."""

    model_config = TABLE

    num_experts: Size
    """Routed experts in each MoE layer; 8 to 256 are usual. `parallel.ep` must divide it."""
    top_k: Size
    """Experts that each token is sent to; 1 to 8 are usual."""
    expert_hidden_size: Size
    """Inner width of one expert; fine-grained experts use a quarter of a dense layer's, or less."""
    num_shared_experts: SizeOrZero = 0
    """Experts that see every token, besides the routed ones; held as one MLP of this many times the width."""
    shared_expert_gate: bool = False
    """Weigh the shared experts' result by a learned sigmoid of the token, as Qwen2Moe and Qwen3Next do."""
    router: RouterKind = "softmax"
    """Who goes where: softmax, sigmoid with a bias (DeepSeek-V3), switch (top-1), sinkhorn, expert_choice, noisy."""
    normalise_top_k: bool = True
    """Divide the chosen experts' weights by their sum, as Mixtral does; switch, sinkhorn and expert_choice never do.

    To train with top_k = 1 it must be false: a single weight would always be 1, and the router would learn nothing."""
    weight_scale: PositiveFloat = 1.0
    """What the weights are multiplied by; 2.5 in DeepSeek-V3 (its `routed_scaling_factor`)."""
    num_groups: Size = 1
    """Neighbouring experts in so many groups, for softmax and sigmoid; 8 in DeepSeek-V3, often one for each node."""
    top_groups: Size = 1
    """A token's experts come from so many of the groups; 4 in DeepSeek-V3."""
    bias_rate: NonNegativeFloat = 0.001
    """How far in a step sigmoid's bias or expert_choice's thresholds move towards an even load; 0 = not at all."""
    load_balancing: Literal["sequence", "step", "none"] = "sequence"
    """What the load-balancing loss counts: each sequence by itself, the previous step's global load, or no loss.

    With sigmoid, sinkhorn and expert_choice, which balance without one, "none" unless something else is written."""
    load_balancing_weight: NonNegativeFloat = 0.01
    """Weight of the load-balancing loss; 0.001 to 0.02 are usual."""
    z_loss_weight: NonNegativeFloat = 0.001
    """Weight of the router's z-loss, which keeps its scores small; 0 turns it off, 0.001 is usual."""
    capacity_factor: Annotated[float, Field(ge=0.0, le=MOST_CAPACITY)] = 0.0
    """0 = dropless; else an expert takes ceil(this * top_k * tokens / num_experts) of a sequence in training.

    With router = "switch" it is 1.25 unless something else is written."""
    router_jitter: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """In training the router's input is multiplied by numbers from 1 - this to 1 + this (Switch: 0.01); 0 = not."""

    expert_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of each routed expert's inner numbers that is zeroed in training; 0.4 in Switch's fine-tuning."""

    @validator(mode="before")
    @classmethod
    def _as_published(cls, table: Any) -> Any:
        """Fill in what was left out as the router was published."""
        router = table.get("router") if isinstance(table, dict) else None
        if router in BALANCED_WITHOUT_LOSS:
            table = {"load_balancing": "none", **table}
        if router in NEVER_NORMALISED:
            table = {"normalise_top_k": False, **table}
        return {"capacity_factor": 1.25, **table} if router == "switch" else table

    @property
    def shared_hidden_size(self) -> int:
        """Return the width of the one MLP that all shared experts make together."""
        return self.num_shared_experts * self.expert_hidden_size


@dataclass(frozen=True, eq=False)
class MoeKind(Kind):
    """Routed experts, and perhaps shared ones."""

    # ffn_hidden_size is the width of the dense model that experts are made of (init.upcycle), and of no matrix here.
    reads: ClassVar[frozenset[str]] = frozenset({"ffn_hidden_size", "ffn_activation", "ffn_dropout", "bias.ffn"})

    def reads_of(self, model: ModelConfig) -> frozenset[str]:
        """Return them; ffn_dropout is of shared experts, as the routed ones have model.moe.expert_dropout."""
        has_shared = model.moe is not None and model.moe.num_shared_experts > 0
        return self.reads if has_shared else self.reads - {"ffn_dropout"}

    def weights(self, model: ModelConfig) -> Named:
        """Yield the router, the stacks of the experts, and the shared expert."""
        moe, h = _table(model), model.hidden_size
        e, width = moe.num_experts, moe.expert_hidden_size
        met = (moe.top_k, e)
        yield "router.weight", matrix(e, h)
        if moe.router == "noisy":
            yield "router.noise_weight", matrix(e, h)
        for name in inwards(model):
            yield f"experts.{name}", Weight((e, width, h), OVER_EXPERTS, is_product=True, met_of=met)
        yield "experts.down", Weight((e, h, width), OVER_EXPERTS, is_product=True, met_of=met)
        if "ffn" in model.bias:
            for name in inwards(model):
                yield f"experts.{name}_bias", Weight((e, width), OVER_EXPERTS, met_of=met)
            yield "experts.down_bias", Weight((e, h), EXPERT_OUTPUTS, met_of=met)
        if moe.num_shared_experts:
            yield from ((f"shared.{name}", weight) for name, weight in mlp_weights(model, moe.shared_hidden_size))
        if moe.shared_expert_gate:
            yield "shared_gate.weight", matrix(1, h)

    def kept(self, model: ModelConfig, degrees: Degrees, types: Types) -> float:
        """Return what stands at the head of this file."""
        moe, h = _table(model), model.hidden_size
        columns = len(inwards(model))
        between = (h + (columns + 1) * moe.expert_hidden_size) * types.product
        rows = moe.top_k * min(1.0, moe.capacity_factor or 1.0)
        routed = rows / degrees.tp * (h * degrees.etp * types.inputs(columns) + between)
        of_scores = moe.num_experts * types.wide * (4 if moe.router == "noisy" else 2)
        of_choices = moe.top_k * (2 * 8 + types.wide) + rows * 8
        of_router = (h * types.wide + of_scores + of_choices) / degrees.tp
        found = norm_inputs(model, self.place, degrees, types) + of_router + routed
        is_narrow = types.stream < types.wide
        if moe.num_shared_experts:
            found += mlp_kept(model, moe.shared_hidden_size, degrees, types)
            # The shared experts take the very tensor that the router does, unless either has a copy.
            if not (types.is_cast or is_narrow or moe.router_jitter):
                found -= normed_input(model, columns, degrees, types)
        if moe.shared_expert_gate:
            found += h / degrees.tp * (types.product + types.wide * is_narrow)
        return found

    def state_bytes(self, model: ModelConfig, tokens: int, width: int) -> float:
        """Return the record of where the tokens went: an expert's number and a weight, of 4 bytes each."""
        moe = _table(model)
        return 8.0 * tokens * (moe.num_experts if moe.router == "expert_choice" else moe.top_k)

    def problems(self, model: ModelConfig, choose: Choose) -> list[str]:
        """Return what is wrong with the numbers of experts, and what the router does not do."""
        moe = _table(model)
        found = [*_router_problems(moe), *_group_problems(model, choose)]
        if moe.top_k > moe.num_experts:
            found.append(
                f"model.moe.top_k = {moe.top_k}: must not exceed model.moe.num_experts = {moe.num_experts};"
                f" {up_to(moe.num_experts)} would fit"
            )
        if moe.shared_expert_gate and not moe.num_shared_experts:
            found.append(
                "model.moe.shared_expert_gate = true: weighs shared experts, and model.moe.num_shared_experts = 0;"
                " 1 would fit, or false"
            )
        return found

    def needs(self, model: ModelConfig) -> list[Need]:
        """Return that ep divides the experts, etp their width, and tp that of the shared ones."""
        moe = _table(model)
        found = [
            Need("ep", "model.moe.num_experts", moe.num_experts),
            Need("etp", "model.moe.expert_hidden_size", moe.expert_hidden_size),
        ]
        if moe.num_shared_experts:
            found.append(Need("tp", "model.moe.num_shared_experts * expert_hidden_size", moe.shared_hidden_size))
        return found

    def narrowed(self, model: ModelConfig, small: Small, above: int) -> dict[str, Any]:
        """Return few and narrow experts: one on a rank, or several, as the model has them."""
        moe, target, needs = _table(model), small.target, small.needs
        of_a_rank = moe.num_experts // target.ep
        few = 1 if of_a_rank == 1 else 3 if of_a_rank % 2 else 2
        top_k = min(moe.top_k, 2)
        experts = needs.ep * few
        while experts < min(moe.num_experts, top_k + 1):
            experts += needs.ep * few
        groups = min(moe.num_groups, 2)
        while experts % groups or experts // groups < max(top_k, groups):
            experts += needs.ep * few
        shared = min(moe.num_shared_experts, 2)
        width = _small_width(moe.expert_hidden_size, shared, small, above=above)
        sizes = {
            "num_experts": experts,
            "top_k": experts if moe.top_k == moe.num_experts else top_k,
            "expert_hidden_size": width,
            "num_shared_experts": shared,
            "num_groups": groups,
            "top_groups": groups if moe.top_groups == moe.num_groups else 1,
        }
        return {"moe": moe.model_copy(update=sizes)}


def _router_problems(moe: MoeConfig) -> list[str]:
    """Return the keys that the router has no use for."""
    found, router = [], f'model.moe.router = "{moe.router}"'
    if moe.router == "switch" and moe.top_k != 1:
        found.append(f"model.moe.top_k = {moe.top_k}: {router} sends a token to one expert; 1 would fit")
    if moe.router in NEVER_NORMALISED and moe.normalise_top_k:
        found.append(f"model.moe.normalise_top_k = true: {router} never divides weights by their sum; leave it out")
    if moe.router == "expert_choice" and moe.capacity_factor:
        found.append(
            f"model.moe.capacity_factor = {moe.capacity_factor}: with {router} experts take"
            " top_k * tokens / num_experts of a sequence each; leave it out"
        )
    return found


def _group_problems(model: ModelConfig, choose: Choose) -> list[str]:
    """Return why the experts do not lie in these groups; what is said to fit is right with all rules of groups."""
    moe = _table(model)
    groups, kept, e, found = moe.num_groups, moe.top_groups, moe.num_experts, list[str]()
    if groups == kept == 1:
        return []
    if moe.router not in BEST_OF_GROUP:
        rule = f'model.moe.router = "{moe.router}" knows no groups, "softmax" and "sigmoid" do'
        keys = {"num_groups": groups, "top_groups": kept}
        return [f"model.moe.{key} = {value}: {rule}; 1 would fit" for key, value in keys.items() if value > 1]
    if e % groups:
        rule = f"must divide model.moe.num_experts = {e}"
        found.append(f"model.moe.num_groups = {groups}: {rule}; {_groups_that_fit(model, choose)}")
    if kept > groups:
        enough = [size for size in range(1, groups + 1) if e % groups == 0 and _holds_choice(moe, groups, size)]
        fits = f"{enough[0]} to {groups}" if enough and enough[0] < groups else f"{groups}" if enough else up_to(groups)
        found.append(
            f"model.moe.top_groups = {kept}: must not exceed model.moe.num_groups = {groups}; {fits} would fit"
        )
    if e % groups == 0 and not _holds_choice(moe, groups, min(kept, groups)):
        needed = max(BEST_OF_GROUP[moe.router], -(-moe.top_k // kept))
        found.append(
            f"model.moe.num_groups = {groups}: a group has {e // groups} of model.moe.num_experts = {e}, and"
            f" model.moe.top_k = {moe.top_k} of model.moe.top_groups = {kept} need {needed};"
            f" {_groups_that_fit(model, choose)}"
        )
    return found


def _holds_choice(moe: MoeConfig, groups: int, kept: int) -> bool:
    """Say whether the experts of `kept` of so many equal groups are enough, for top_k and for a group's score."""
    size = moe.num_experts // groups
    return size >= BEST_OF_GROUP[moe.router] and kept * size >= moe.top_k


def _groups_that_fit(model: ModelConfig, choose: Choose) -> str:
    """Return the numbers of groups that go with everything else in the table; with top_groups = 1 there is one."""
    moe = _table(model)
    e, kept = moe.num_experts, moe.top_groups
    sizes = [size for size in divisors(e) if kept <= size and (size == 1 or _holds_choice(moe, size, kept))]
    others = {size: model.model_copy(update={"moe": moe.model_copy(update={"num_groups": size})}) for size in sizes}
    if not sizes:
        return "1 would fit, with model.moe.top_groups = 1"
    return f"one of {nearest(choose('model.moe.num_groups', others), moe.num_groups)} would fit"


def _table(model: ModelConfig) -> MoeConfig:
    assert model.moe is not None, "the checks see to it that E has its table"
    return model.moe


def _small_width(size: int, shared: int, small: Small, *, above: int) -> int:
    """Return a width that etp splits as it splits `size`, and of whose shared experts tp makes equal parts."""
    needs = small.needs
    first = small.inner(size, small.target.etp, needs.etp, above=above)
    widths = (first + step * needs.etp * ALIGNED for step in range(needs.tp))
    fitting = (width for width in widths if width * shared % needs.tp == 0)
    return next(fitting, lcm(needs.etp, needs.tp) * first)
