"""SwitchHead attention: experts make each head's values and output (Csordas et al. 2024, "SwitchHead", section 2.2).

Queries and keys are dense. A head h of n has E experts for its values and E for its output; of both a token chooses the
k with the largest gates, by what it is as a source (its values are seen) and as a destination (it sees):

    source gates       sigmoid(source[h] x)        [E]     value of head h  = sum over k chosen e of gate_e  v[h, e] x
    destination gates  sigmoid(destination[h] x)   [E]     y = sum over h, k chosen e of gate_e  output[h, e] mixed[h]

So few heads do what many did, with less of the scores' memory. The gates are sigmoids, each expert's by itself: nothing
needs to keep a load in balance, and no token is dropped. Experts of all heads are one stack, [n*E, d, h] for values and
[n*E, h, d] for the output: one grouped product serves all of them, on rows sorted by head and expert. Scores are at
least fp32, ties go to the lower expert, and a recompute chooses nothing again.

Under tensor parallelism a rank has n/tp heads with their experts and gates; tokens are gathered before and their sums
scattered after. Under context parallelism only the mixing communicates: values have gone through their experts by then.
Decoding keeps keys and values as attention does, and which experts, with which gates, made each value and each output.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from meshwright.kernels.matmul.gathered_rows import grouped_linear_of_gathered
from meshwright.kernels.matmul.grouped import grouped_linear
from meshwright.kernels.precision import at_least_fp32, without_autocast
from meshwright.model.config import ModelConfig
from meshwright.model.making import Making
from meshwright.model.mixers.attention_cache import KeyValueCache
from meshwright.model.mixers.attention_core import ONE_RANK, USUAL_LOOK, AttentionCore, Look, Spread, look_of
from meshwright.model.positions import Rope
from meshwright.model.routing_record import RoutingRecord, empty_record
from meshwright.parallel.collectives import gather, scatter_sum
from meshwright.parallel.fits import check_sizes
from meshwright.parallel.initialise import InitPolicy, InitRule
from meshwright.parallel.placement import Placement, Split
from meshwright.parallel.tally import Tally
from meshwright.parallel.tensor.linear import ColumnLinear, divide
from meshwright.parallel.where import Where


class SwitchSizes(NamedTuple):
    """The heads and their experts."""

    num_heads: int
    head_dim: int
    num_experts: int
    """Of each head, for its values; as many for its output."""
    top_k: int = 2
    """How many a token chooses of either."""


class Chosen(NamedTuple):
    """Which of each head's experts a token goes to, and with what weight."""

    expert: Int64[Tensor, "s b n top_k"]
    gate: Float[Tensor, "s b n top_k"]


@dataclass
class SwitchHeadState:
    """Keys and values of the tokens seen so far, and which experts made values and output of each.

    The records are of all tokens, also where only a window's keys and values are held: to be replayed from the first.
    """

    cache: KeyValueCache
    source: RoutingRecord
    destination: RoutingRecord

    @property
    def at(self) -> Tensor | None:
        """Return the positions of the next tokens, where they do not follow on each other (model/depth.py)."""
        return self.cache.at

    @at.setter
    def at(self, position: Tensor) -> None:
        self.cache.at = position


class SwitchHead(nn.Module):
    """Self-attention with experts in its value and output products."""

    def __init__(
        self,
        hidden_size: int,
        sizes: SwitchSizes,
        *,
        look: Look = USUAL_LOOK,
        name: str = "attention",
        init: InitPolicy | None = None,
        spread: Spread = ONE_RANK,
    ) -> None:
        """Take global sizes; `name` is the layer's global name.

        Raises:
            ValueError: if a token would choose more experts than there are, or tp does not divide the heads.
        """
        super().__init__()
        check_sizes({"hidden_size": hidden_size, **sizes._asdict()})
        n, d, num_experts, top_k = sizes
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k = {top_k} must be from 1 to num_experts = {num_experts}")
        if isinstance(look.position, Rope):
            look.position.turned(d)
        init, tp = init or InitPolicy(), spread.tp
        stack = divide(n, tp.size, what="num_heads", by=tp.name) * num_experts
        self.sizes, self.spread = sizes, spread
        inward, gates = init.matrix(hidden_size, n * d), init.matrix(hidden_size, n * num_experts)
        self.rules = {"source": gates, "destination": gates, "v": init.matrix(hidden_size, n * d, is_value=True)}
        self.rules["output"] = init.matrix(n * d, hidden_size, to_residual=True)
        self.q = ColumnLinear(hidden_size, n * d, rule=inward, tp=tp)
        self.k = ColumnLinear(hidden_size, n * d, rule=inward, tp=tp)
        self.source = nn.Parameter(torch.empty(stack, hidden_size))
        self.destination = nn.Parameter(torch.empty(stack, hidden_size))
        self.v = nn.Parameter(torch.empty(stack, d, hidden_size))
        self.output = nn.Parameter(torch.empty(stack, hidden_size, d))
        self.core = AttentionCore(n, look, name=name, init=init, spread=spread)

    def placements(self) -> dict[str, Placement]:
        """Say that gates and experts are cut along the heads."""
        return dict.fromkeys(self.rules, Placement((Split(0, self.spread.tp),)))

    def init_rules(self) -> dict[str, InitRule]:
        """Say how each parameter begins."""
        return self.rules

    def forward(
        self, x: Float[Tensor, "s_local b h"], where: Where, tally: Tally | None
    ) -> Float[Tensor, "s_local b h"]:
        """Let each token attend to what it sees of its sample (of its document, where `where` says so).

        Raises:
            ValueError: if `where` is of other tokens.
        """
        where.refuse_others(x)
        x = gather(x, self.spread.tp)
        wide = at_least_fp32(x)  # once for both, which keep it
        source, destination = self._chosen(wide, self.source, where), self._chosen(wide, self.destination, where)
        q, k = self.core.turned(*self._queries_and_keys(x), where)
        mixed = self.core(q, k, self._values(x, source), where)
        return scatter_sum(self._outputs(mixed, destination), self.spread.tp)

    def initial_state(self, batch: int, max_len: int | None = None) -> SwitchHeadState:
        """Return an empty state for `batch` samples of at most `max_len` tokens (None: it grows)."""
        d, num_experts, top_k = self.sizes[1:]
        heads = self.source.shape[0] // num_experts
        source, destination = (empty_record(batch, max_len, (heads, top_k), self.v) for _ in range(2))
        return SwitchHeadState(self.core.empty_cache(batch, max_len, heads, (d, d), self.v), source, destination)

    def step(self, x: Float[Tensor, "s b h"], state: SwitchHeadState) -> Float[Tensor, "s b h"]:
        """Attend from the next tokens to all that the state holds, and add them to it.

        Raises:
            ValueError: if it has no room for them.
        """
        state.cache.next_rows(len(x))  # refuses before anything is written down
        source = self._recorded(x, self.source, state.source)
        destination = self._recorded(x, self.destination, state.destination)
        q, k = self._queries_and_keys(x)
        mixed = self.core.step(q, k, self._values(x, source), state.cache)
        return self._outputs(mixed, destination)

    def _recorded(self, x: Tensor, gates: Tensor, record: RoutingRecord) -> Chosen:
        """Return where the next tokens went if that is replayed, else where they go, and write it down."""
        if record.is_replayed:
            again = record.again(x)
            return Chosen(again.expert, again.weight)
        chosen = self._chosen(x, gates)
        record.add(chosen.expert, chosen.gate)
        return chosen

    def _queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (torch.unflatten(column(x), 2, (-1, self.sizes.head_dim)) for column in (self.q, self.k))
        return q, k

    def _chosen(self, x: Tensor, gates: Tensor, where: Where | None = None) -> Chosen:
        """Return the experts with the largest gates of each head, and the gates."""
        with without_autocast(x):
            scores = at_least_fp32(x) @ at_least_fp32(gates).T
        scores = torch.unflatten(scores, 2, (-1, self.sizes.num_experts))
        what = "source" if gates is self.source else "destination"
        choose = partial(self.choose, scores.detach(), what)
        expert = choose() if where is None else where.decide(f"switch_head/{id(self)}/{what}", choose)
        return Chosen(expert, scores.gather(3, expert).sigmoid())

    def choose(self, scores: Float[Tensor, "s b n e"], what: str) -> Int64[Tensor, "s b n k"]:
        """Return each head's experts, the highest first; `what` they are of: source or destination."""
        # A stable sort: among equal scores topk returns any. Contiguous: what is kept of it is not all experts.
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., : self.sizes.top_k].contiguous()

    def _values(self, x: Tensor, chosen: Chosen) -> Float[Tensor, "s b n d"]:
        token, place, counts = self._sorted(chosen.expert)
        tokens = x.flatten(0, 1)
        rows = grouped_linear_of_gathered(tokens, self.v, token // chosen.expert.shape[2:].numel(), place, counts)
        values: Tensor = rows[place.flatten()].view(*chosen.expert.shape, rows.shape[1])
        return (values * chosen.gate[..., None].to(values.dtype)).sum(3)

    def _outputs(self, mixed: Tensor, chosen: Chosen) -> Float[Tensor, "s b h"]:
        choice, place, counts = self._sorted(chosen.expert)
        weighted = mixed[..., None, :] * chosen.gate[..., None].to(mixed.dtype)  # [s, b, n, k, d]
        rows = grouped_linear(weighted.flatten(0, 3)[choice], self.output, counts)
        summed: Tensor = rows[place.flatten()].view(*place.shape, rows.shape[1]).sum(1)
        return summed.view(*mixed.shape[:2], rows.shape[1])

    def _sorted(self, expert: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the choices [s*b*n*k] by head and expert, each token's places among them, and how many each has."""
        heads, num_experts = expert.shape[2], self.sizes.num_experts
        stacked = (expert + num_experts * torch.arange(heads, device=expert.device)[:, None]).flatten()
        order = stacked.argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        counts = torch.bincount(stacked, minlength=heads * num_experts)
        return order, place.view(expert.shape[:2].numel(), expert.shape[2:].numel()), counts


def make(config: ModelConfig, making: Making) -> SwitchHead:
    """Return SwitchHead attention as the config has it."""
    table = config.switch_head
    assert table is not None, "the checks let no H pass without a [model.switch_head]"
    return SwitchHead(
        config.hidden_size,
        SwitchSizes(config.num_heads, config.head_dim, table.num_experts, table.top_k),
        look=look_of(config),
        name=making.layer,
        init=making.init,
        spread=Spread(making.mesh.tp, cp=making.mesh.cp, context=making.ways.context),
    )
