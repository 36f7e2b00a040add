"""What all routers have in common: scores, the numbers that a choice goes by, weights.

    scores       [t, e]   x W^T, in at least fp32
    probability  [t, e]   softmax or sigmoid of the scores: what weights come from
    ranking      [t, e]   what the choice goes by: the probability, or something made of it
    expert       [t, k]   the k highest of the ranking; among equals the lower index (a plain topk picks any)
    weight       [t, k]   the chosen ones' probability, divided by their sum if normalised, times `scale`

A choice goes through `where.decide`: scores that are recomputed could round otherwise, and a token would go elsewhere
than to the expert whose gradient is due. Without `where`, or in evaluation, a router routes as at inference: nothing is
drawn, and no token's choice depends on a later token.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from meshwright.kernels.precision import at_least_fp32
from meshwright.model.wide_buffers import WideBuffers
from meshwright.parallel.dropout import jitter
from meshwright.parallel.fits import check_finite, check_not_below_zero, check_share, check_sizes
from meshwright.parallel.initialise import InitPolicy, InitRule
from meshwright.parallel.mesh import NO_TP, Axis
from meshwright.parallel.placement import Placement, partial_over
from meshwright.parallel.tally import Tally
from meshwright.parallel.where import Where

NO_TOKEN = Axis("token")
# DeepSeek-V3 adds it to the sum that weights are divided by.
_SMALLEST_SUM = 1e-20


class Routing(NamedTuple):
    """The decision for each token, and the scores that it came from."""

    expert: Int64[Tensor, "*tokens k"]
    weight: Float[Tensor, "*tokens k"]
    scores: Float[Tensor, "*tokens e"]
    probability: Float[Tensor, "*tokens e"]
    """What the load-balancing loss averages; it sums to 1 over the experts."""
    taken: Bool[Tensor, "*tokens k"] | None = None
    """Which choices there are, where tokens have different numbers of them; None is all."""

    def flat(self) -> "Routing":
        """Return the same with all tokens along one dim."""
        expert, weight, scores, probability = (part.flatten(0, -2) for part in self[:4])
        return Routing(expert, weight, scores, probability, None if self.taken is None else self.taken.flatten(0, -2))


class Ways(NamedTuple):
    """How a router weighs and chooses, beside its kind; each kind says which of these it knows."""

    normalise: bool | None = None
    """Whether a token's weights are made to sum to 1; None is as the router was published."""
    scale: float = 1.0
    """What weights are multiplied by (DeepSeek's `routed_scaling_factor`)."""
    num_groups: int = 1
    """Experts lie in so many neighbouring groups, ..."""
    top_groups: int = 1
    """... of which a token's experts come from so many (DeepSeek-V2, section 2.2.3)."""
    bias_rate: float = 0.001
    """How far what balances without a loss moves in a step: `sigmoid`'s bias, `expert_choice`'s thresholds."""
    jitter: float = 0.0
    """In training each feature of what the router sees is multiplied by a number in (1 - jitter, 1 + jitter)."""


AS_PUBLISHED = Ways()


class Router(WideBuffers):
    """A linear score for each expert, and the k highest; kinds differ in what they override."""

    normalises: ClassVar[bool | None] = True
    """Whether weights sum to 1 unless something else is asked for; None: they never do, and it cannot be asked for."""
    best_of_group: ClassVar[int] = 0
    """How many of a group's experts its score is the sum of; 0: this router knows no groups."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        ways: Ways = AS_PUBLISHED,
        *,
        name: str = "moe",
        init: InitPolicy | None = None,
        tp: Axis = NO_TP,
        token: Axis = NO_TOKEN,
    ) -> None:
        """Take global sizes; each rank of `tp` routes other tokens, and those of one sequence lie along `token`.

        `name` is the layer's global name, by which random numbers are drawn and counts are tallied.

        Raises:
            ValueError: if a token would go to more experts than there are, or the router does not do what is asked.
        """
        super().__init__()
        check_sizes({"hidden_size": hidden_size, "num_experts": num_experts})
        check_share("jitter", ways.jitter)
        check_not_below_zero("bias_rate", ways.bias_rate)
        check_finite({"scale": ways.scale}, usual=1.0)
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k = {top_k} must be from 1 to num_experts = {num_experts}")
        if ways.normalise and self.normalises is None:
            raise ValueError(f"normalise = True: the weights of {type(self).__name__} never sum to 1; leave it out")
        _check_groups(num_experts, top_k, ways, self.best_of_group, type(self).__name__)
        self.num_experts, self.top_k, self.ways = num_experts, top_k, ways
        self.normalise = bool(self.normalises) if ways.normalise is None else ways.normalise
        self.name, self.tp, self.token = name, tp, token
        self.rule = (init or InitPolicy()).matrix(hidden_size, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    @property
    def most_choices(self) -> int:
        """Return how many experts a token can have."""
        return self.top_k

    def placements(self) -> dict[str, Placement]:
        """Say that the weight is whole, and its gradient the sum of the ranks'."""
        return {"weight": Placement(grad_sum=partial_over(self.tp))}

    def init_rules(self) -> dict[str, InitRule]:
        """Say how each parameter begins."""
        return {"weight": self.rule}

    def forward(self, x: Float[Tensor, "*tokens h"], where: Where | None = None) -> Routing:
        """Choose each token's experts and weigh them; tokens of a `where` stand as [s, b]."""
        trained = where if self.training else None
        with torch.autocast(x.device.type, enabled=False):
            scores = self.scores(self._jittered(x, trained), trained)
            probability = self.probability(scores)

            def choose() -> Tensor:
                with torch.no_grad():
                    ranking = self.ranking(scores.detach(), probability.detach(), trained)
                return self.choose(ranking.flatten(0, -2)).view(*x.shape[:-1], self.top_k)

            expert = self.decide("experts", where, choose)
            weight = self.weigh(probability.gather(-1, expert))
            return Routing(expert, weight, scores, self.shares(probability))

    def scores(self, x: Float[Tensor, "*tokens h"], trained: Where | None) -> Float[Tensor, "*tokens e"]:
        """Return each expert's score for each token, in at least fp32; `trained` says where the tokens stand."""
        return at_least_fp32(x) @ at_least_fp32(self.weight).T

    def probability(self, scores: Float[Tensor, "*tokens e"]) -> Float[Tensor, "*tokens e"]:
        """Return what weights come from."""
        return scores.softmax(-1)

    def ranking(self, scores: Tensor, probability: Tensor, trained: Where | None) -> Float[Tensor, "*tokens e"]:
        """Return what the choice goes by."""
        return within_groups(probability, self.ways.num_groups, self.ways.top_groups, self.best_of_group)

    def choose(self, ranking: Float[Tensor, "t e"]) -> Int64[Tensor, "t k"]:
        """Return each token's experts, the highest first."""
        # A stable sort, not topk: among equal scores topk returned any of them (42, 43, 44, 41).
        # Contiguous: what is kept of it for the backward pass is not all experts.
        return ranking.sort(dim=-1, descending=True, stable=True).indices[:, : self.top_k].contiguous()

    def weigh(self, chosen: Float[Tensor, "*tokens k"]) -> Float[Tensor, "*tokens k"]:
        """Return the weights of the chosen experts from their probabilities."""
        if self.normalise:
            chosen = chosen / (chosen.sum(-1, keepdim=True) + _SMALLEST_SUM)
        return chosen if self.ways.scale == 1.0 else chosen * self.ways.scale

    def shares(self, probability: Float[Tensor, "*tokens e"]) -> Float[Tensor, "*tokens e"]:
        """Return probabilities that sum to 1 over the experts, for the load-balancing loss."""
        return probability

    def count(self, routing: Routing, where: Where, tally: Tally) -> None:
        """Add what the router itself counts to the step's tally; most count nothing."""

    def decide(self, what: str, where: Where | None, choose: Any) -> Any:
        """Return what `choose` decides; in a recomputed pass what was decided in the first."""
        return choose() if where is None else where.decide(f"{what}/{id(self)}", choose)

    def _jittered(self, x: Tensor, trained: Where | None) -> Tensor:
        if trained is None or not self.ways.jitter:
            return x
        return jitter(at_least_fp32(x), self.ways.jitter, where=trained, name=f"{self.name}/router_jitter")


def within_groups(
    ranking: Float[Tensor, "*tokens e"], num_groups: int, top_groups: int, best: int
) -> Float[Tensor, "*tokens e"]:
    """Return the ranking with -inf for experts outside of each token's `top_groups` best groups.

    A group's score is the sum of its `best` highest: 1 in DeepSeek-V2, 2 in DeepSeek-V3; ties go to the lower group.
    """
    if top_groups == num_groups:
        return ranking
    of_groups = torch.unflatten(ranking, -1, (num_groups, -1))
    score = of_groups.sort(dim=-1, descending=True).values[..., :best].sum(-1)
    order = score.sort(dim=-1, descending=True, stable=True).indices
    kept = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order[..., :top_groups], True)
    return of_groups.masked_fill(~kept[..., None], -torch.inf).flatten(-2)


def _check_groups(num_experts: int, top_k: int, ways: Ways, best: int, kind: str) -> None:
    groups, kept = ways.num_groups, ways.top_groups
    if groups == kept == 1:
        return
    if best == 0:
        raise ValueError(f"num_groups = {groups}: {kind} knows no groups; softmax and sigmoid routers do")
    if groups < 1 or num_experts % groups != 0:
        raise ValueError(f"num_experts = {num_experts} does not divide by num_groups = {groups}")
    size = num_experts // groups
    if not 1 <= kept <= groups:
        raise ValueError(f"top_groups = {kept} must be from 1 to num_groups = {groups}")
    if size < best or top_k > kept * size:
        needed = max(best, -(-top_k // kept))
        raise ValueError(f"a group has num_experts / num_groups = {size} experts, and at least {needed} are needed")
