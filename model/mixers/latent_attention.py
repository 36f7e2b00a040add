"""Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values of all heads from one small latent.

    q        [n*(p + r), h], or  q_b [n*(p + r), a] of norm(q_a x), a = q_lora_rank      of a head: p plain, r rotary
    latent   norm(kv_a x)  [c]        k = k_b latent  [n, p]        v = v_b latent  [n, e]
    k_rope   [r], turned by its position, shared by all heads

    scores   scale ( q_plain k + q_rope k_rope ),  scale = 1 / sqrt(p + r) by default      output [h, n*e]

Each token's latents are computed where the token is held between layers, normalised there, and gathered over tp; so the
weights of q_a, kv_a, k_rope and the norms are whole on each rank, and their gradients a part of the sum over tp:

    x [s/tp, b, h] --q_a, kv_a, k_rope--> latents [s/tp, b, a + c + r] --gather--> --q_b, k_b, v_b--> n/tp heads

Decoding keeps the latent and the rotary key alone, c + r numbers a token for all heads. The products with k_b and v_b
are moved to the queries and to the result, so that neither keys nor values are ever made:

    q k = q (k_b latent) = (k_b^T q) latent        sum_j p_j v_b latent_j = v_b (sum_j p_j latent_j)

That is attention of n query heads to one key head of width c + r, whose values are its first c numbers. Rotary features
are half-split; a checkpoint with interleaved pairs has its rows permuted on import.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from meshwright.kernels.attention.attention import cached_attention
from meshwright.kernels.attention.rope import apply_rope
from meshwright.kernels.attention.seen import Seen
from meshwright.kernels.matmul.linear import linear
from meshwright.model.config import ModelConfig
from meshwright.model.making import Making
from meshwright.model.mixers.attention_core import ONE_RANK, USUAL_LOOK, AttentionCore, Look, Spread, look_of
from meshwright.model.norms import RMSNorm
from meshwright.model.positions import Rope, yarn_scale
from meshwright.model.room import refuse_beyond, with_room
from meshwright.parallel.collectives import gather
from meshwright.parallel.fits import check_sizes
from meshwright.parallel.initialise import ZEROS, InitPolicy, InitRule
from meshwright.parallel.mesh import Axis
from meshwright.parallel.placement import Placement, partial_over
from meshwright.parallel.tally import Tally
from meshwright.parallel.tensor.linear import ColumnLinear, RowLinear, column_products, divide
from meshwright.parallel.where import Where


class LatentSizes(NamedTuple):
    """The heads, and the widths of the latents."""

    num_heads: int
    kv_lora_rank: int
    """c: of the latent that keys and values are made of."""
    qk_nope_head_dim: int
    """p: features of a head's queries and keys that know no position."""
    qk_rope_head_dim: int
    """r: those that are turned; the key's are shared by all heads."""
    v_head_dim: int
    """e: of a head's values."""
    q_lora_rank: int = 0
    """a: of the latent that queries are made of; 0: they are made of x."""


@dataclass
class LatentCache:
    """The latents and rotary keys of the tokens seen so far."""

    rows: Float[Tensor, "room b width"]
    """Of each token its latent, then its turned rotary key."""
    max_len: int | None
    """How many tokens it was made for; None: it grows with them."""
    length: int = 0
    at: Int64[Tensor, " s"] | None = None
    """Positions of the next tokens, where they do not follow on each other (model/depth.py)."""


class LatentAttention(nn.Module):
    """Causal self-attention whose keys and values come from a latent."""

    def __init__(
        self,
        hidden_size: int,
        sizes: LatentSizes,
        *,
        look: Look = USUAL_LOOK,
        norm_eps: float = 1e-6,
        bias: bool = False,
        name: str = "attention",
        init: InitPolicy | None = None,
        spread: Spread = ONE_RANK,
    ) -> None:
        """Take global sizes; `look.position` is rotary, `bias` is of q_a, kv_a, k_rope and output.

        Raises:
            ValueError: if tp does not divide the heads, or `look` asks for what latents do not have.
        """
        super().__init__()
        rope = look.position
        if not isinstance(rope, Rope) or rope.fraction != 1.0 or look.window or look.blocks or not look.is_causal:
            raise ValueError(f"{look}: latent attention is causal, to all tokens, with rotary positions of fraction 1")
        check_sizes({"hidden_size": hidden_size, **sizes._asdict()}, may_be_none=("q_lora_rank",))
        n, c, p, r, e, a = sizes
        init, tp = init or InitPolicy(), spread.tp
        divide(n, tp.size, what="num_heads", by=tp.name)
        rope.turned(r)
        self.sizes, self.rope, self.spread = sizes, rope, spread
        self.scale = (p + r) ** -0.5 if look.scale is None else look.scale
        self.q_a = self.q_a_norm = self.q = self.q_b = None
        if a:
            self.q_a = WholeLinear(hidden_size, a, rule=init.matrix(hidden_size, a), bias=bias, tp=tp)
            self.q_a_norm = RMSNorm(a, norm_eps, tp=tp)
            self.q_b = ColumnLinear(a, n * (p + r), rule=init.matrix(a, n * (p + r)), tp=tp)
        else:
            self.q = ColumnLinear(hidden_size, n * (p + r), rule=init.matrix(hidden_size, n * (p + r)), tp=tp)
        self.kv_a = WholeLinear(hidden_size, c, rule=init.matrix(hidden_size, c), bias=bias, tp=tp)
        self.k_rope = WholeLinear(hidden_size, r, rule=init.matrix(hidden_size, r), bias=bias, tp=tp)
        self.kv_a_norm = RMSNorm(c, norm_eps, tp=tp)
        self.k_b = ColumnLinear(c, n * p, rule=init.matrix(c, n * p), tp=tp)
        self.v_b = ColumnLinear(c, n * e, rule=init.matrix(c, n * e, is_value=True), tp=tp)
        to_residual = init.matrix(n * e, hidden_size, to_residual=True)
        self.output = RowLinear(n * e, hidden_size, rule=to_residual, bias=bias, tp=tp)
        core = look._replace(position=None, scale=self.scale)
        self.core = AttentionCore(n, core, name=name, init=init, spread=spread)

    def forward(
        self, x: Float[Tensor, "s_local b h"], where: Where, tally: Tally | None
    ) -> Float[Tensor, "s_local b h"]:
        """Let each token attend to those before it in its sample (in its document, where `where` says so).

        Raises:
            ValueError: if `where` is of other tokens.
        """
        where.refuse_others(x)
        tp, (n, _, p, r, e, _) = self.spread.tp, self.sizes
        q = self._queries(x)
        k, v = column_products(self.kv_a_norm(self.kv_a(x)), (self.k_b, self.v_b), tp)
        angles = self.rope.angles_at(where, r, x.dtype)
        k_rope = apply_rope(gather(self.k_rope(x), tp)[:, :, None], *angles)
        q = torch.cat([q[..., :p], apply_rope(q[..., p:], *angles)], 3)
        n_local = n // tp.size
        k = torch.cat([torch.unflatten(k, 2, (n_local, p)), k_rope.to(k.dtype).expand(-1, -1, n_local, -1)], 3)
        mixed = self.core(q, k, torch.unflatten(v, 2, (n_local, e)), where)
        return self.output(mixed.flatten(2))  # type: ignore[no-any-return]

    def initial_state(self, batch: int, max_len: int | None = None) -> LatentCache:
        """Return an empty cache for `batch` samples of at most `max_len` tokens (None: it grows)."""
        width = self.sizes.kv_lora_rank + self.sizes.qk_rope_head_dim
        return LatentCache(self.kv_a.weight.new_empty(max_len or 0, batch, width), max_len)

    def step(self, x: Float[Tensor, "s b h"], state: LatentCache) -> Float[Tensor, "s b h"]:
        """Attend from the next tokens to all that the cache holds, and add them to it.

        Raises:
            ValueError: if the cache has no room for them.
        """
        begin, end = state.length, state.length + len(x)
        refuse_beyond(state.max_len, end)
        _, c, p, r, _, _ = self.sizes
        position = torch.arange(begin, end, device=x.device) if state.at is None else state.at
        angles = self.rope.angles(position, r, x.dtype)
        k_rope = apply_rope(self.k_rope(x)[:, :, None], *angles)[:, :, 0]
        latent = self.kv_a_norm(self.kv_a(x))
        state.rows = with_room(state.rows, end)
        state.rows[begin:end] = torch.cat([latent, k_rope.to(latent.dtype)], 2)
        state.length = end
        q = self._queries(x)
        k_b, v_b = (torch.unflatten(part.weight, 0, (q.shape[2], -1)) for part in (self.k_b, self.v_b))
        in_latents = torch.einsum("sbnp,npc->sbnc", q[..., :p], k_b.to(q.dtype))
        queries = torch.cat([in_latents, apply_rope(q[..., p:], *angles)], 3)
        held = state.rows[:end, :, None].to(q.dtype)
        mixed = cached_attention(queries, held, held[..., :c], Seen(scale=self.scale))
        values = torch.einsum("sbnc,nec->sbne", mixed, v_b.to(mixed.dtype))
        return self.output(values.flatten(2))  # type: ignore[no-any-return]

    def _queries(self, x: Tensor) -> Float[Tensor, "s b n width"]:
        tp, width = self.spread.tp, self.sizes.qk_nope_head_dim + self.sizes.qk_rope_head_dim
        if self.q_a is not None and self.q_a_norm is not None and self.q_b is not None:
            [q] = column_products(self.q_a_norm(self.q_a(x)), (self.q_b,), tp)
        else:
            assert self.q is not None, "queries come from a latent or from x"
            [q] = column_products(x, (self.q,), tp)
        return torch.unflatten(q, 2, (-1, width))


def make(config: ModelConfig, making: Making) -> LatentAttention:
    """Return latent attention as the config has it."""
    table, look = config.latent, look_of(config)
    assert table is not None, "the checks let no + pass without a [model.latent]"
    p, r, scaling = table.qk_nope_head_dim, table.qk_rope_head_dim, config.rope_scaling
    scale = look.scale or (p + r) ** -0.5
    if scaling is not None and scaling.mscale_all_dim:
        scale *= yarn_scale(scaling.factor, scaling.mscale_all_dim) ** 2
    sizes = LatentSizes(config.num_heads, table.kv_lora_rank, p, r, table.v_head_dim, table.q_lora_rank)
    return LatentAttention(
        config.hidden_size,
        sizes,
        look=look._replace(scale=scale),
        norm_eps=config.norm_eps,
        bias="q" in config.bias,  # all four letters, or none: the checks see to it
        name=making.layer,
        init=making.init,
        spread=Spread(making.mesh.tp, cp=making.mesh.cp, context=making.ways.context),
    )


class WholeLinear(nn.Module):
    """y = x W^T + b, whole on every rank of tp, of the tokens that this one holds."""

    def __init__(self, in_features: int, out_features: int, *, rule: InitRule, bias: bool, tp: Axis) -> None:
        """Take the sizes and the rule that the weight begins with; a bias begins at zero."""
        super().__init__()
        self.rule, self.tp = rule, tp
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def placements(self) -> dict[str, Placement]:
        """Say that both are whole, and their gradients the sum of the ranks', each of which has other tokens."""
        return dict.fromkeys(("weight", "bias"), Placement(grad_sum=partial_over(self.tp)))

    def init_rules(self) -> dict[str, InitRule]:
        """Say how each parameter begins."""
        return {"weight": self.rule} | ({"bias": ZEROS} if self.bias is not None else {})

    def forward(self, x: Float[Tensor, "*tokens i"]) -> Float[Tensor, "*tokens o"]:
        """Multiply by the weight and add the bias."""
        return linear(x, self.weight, self.bias)
