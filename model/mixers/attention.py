"""Multi-head attention with grouped key and value heads, rotary positions and an optional norm on each head.

q [s, b, n, d]     n heads, in groups that share one of the k key and value heads (GQA: k < n, MQA: k = 1)
k, v [s, b, k, d]  queries and keys are normalised per head (by key), then turned by their position

Under tensor parallelism a rank has n/tp query heads and the k/tp key heads that they share; where k < tp, the
neighbouring ranks whose queries share a key head hold copies of it:

    x [s/tp, b, h] --gather--> [s, b, h] --q, k, v--> heads of this rank --output, sum--> [s/tp, b, h]

Under context parallelism s is s/cp all along, and only the attention itself communicates (`parallel/context/`).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from meshwright.kernels.attention import cached_attention
from meshwright.kernels.rope import apply_rope
from meshwright.model.norms import RMSNorm
from meshwright.model.positions import rotary_angles
from meshwright.parallel.config import ContextWay
from meshwright.parallel.context.attend import context_attention
from meshwright.parallel.context.order import meetings
from meshwright.parallel.initialise import InitPolicy
from meshwright.parallel.mesh import NO_CP, NO_TP, Axis
from meshwright.parallel.tally import Tally
from meshwright.parallel.tensor.linear import NO_COPIES, ColumnLinear, RowLinear, column_products, divide
from meshwright.parallel.where import Where


@dataclass
class KeyValueCache:
    """The keys and values of the tokens seen so far, in room for `max_len` of them."""

    keys: Float[Tensor, "max_len b k d"]
    values: Float[Tensor, "max_len b k d"]
    length: int = 0


class Heads(NamedTuple):
    """How many heads there are, and how wide each is."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


class Spread(NamedTuple):
    """The axes over which heads and samples are spread."""

    tp: Axis = NO_TP
    kv_copies: Axis = NO_COPIES
    """The neighbouring ranks of `tp` that hold the same key and value head (`copies_of_kv_heads`)."""
    cp: Axis = NO_CP
    context: ContextWay = "ring"
    """How positions of a sample on other ranks of `cp` are attended to."""


ONE_RANK = Spread()


class Attention(nn.Module):
    """Causal self-attention over the tokens of a sample."""

    def __init__(
        self,
        hidden_size: int,
        heads: Heads,
        *,
        rope_base: float = 10_000.0,
        qk_norm_eps: float | None = None,
        bias: frozenset[str] = frozenset(),
        init: InitPolicy | None = None,
        spread: Spread = ONE_RANK,
    ) -> None:
        """Take global sizes; `qk_norm_eps` switches the norm of queries and keys on, `bias` names q, k, v, output.

        Raises:
            ValueError: if the key heads do not divide the query heads, or tp does not divide either.
        """
        super().__init__()
        num_heads, num_kv_heads, head_dim = heads
        tp, kv_copies = spread.tp, spread.kv_copies
        if num_heads % num_kv_heads != 0:
            raise ValueError(f"num_heads = {num_heads} does not divide by num_kv_heads = {num_kv_heads}")
        init = init or InitPolicy()
        divide(num_heads, tp.size, what="num_heads", by=tp.name)
        divide(num_kv_heads * kv_copies.size, tp.size, what="num_kv_heads * copies", by=tp.name)
        self.head_dim, self.rope_base, self.spread = head_dim, rope_base, spread
        width, kv_width = num_heads * head_dim, num_kv_heads * head_dim
        inward, kv_inward = init.matrix(hidden_size, width), init.matrix(hidden_size, kv_width)
        self.q = ColumnLinear(hidden_size, width, rule=inward, bias="q" in bias, tp=tp)
        self.k = ColumnLinear(hidden_size, kv_width, rule=kv_inward, bias="k" in bias, tp=tp, copies=kv_copies)
        self.v = ColumnLinear(hidden_size, kv_width, rule=kv_inward, bias="v" in bias, tp=tp, copies=kv_copies)
        to_residual = init.matrix(width, hidden_size, to_residual=True)
        self.output = RowLinear(width, hidden_size, rule=to_residual, bias="output" in bias, tp=tp)
        self.q_norm = RMSNorm(head_dim, qk_norm_eps, tp=tp) if qk_norm_eps is not None else None
        self.k_norm = RMSNorm(head_dim, qk_norm_eps, tp=tp) if qk_norm_eps is not None else None

    def forward(
        self, x: Float[Tensor, "s_local b h"], where: Where, tally: Tally | None
    ) -> Float[Tensor, "s_local b h"]:
        """Let each token attend to those before it in its sample (in its document, where `where` says so)."""
        key = f"rope/{self.head_dim}/{self.rope_base}"
        cos, sin = where.derive(
            key, lambda: rotary_angles(where.position_mixed, self.head_dim, self.rope_base, x.dtype)
        )
        q, k, v = self._heads(x, cos, sin)
        document = where.document_whole if where.mask_documents else None
        meet = None
        cp = self.spread.cp
        if document is not None and cp.is_split:
            meet = where.derive("context/meetings", lambda: meetings(where.document_whole, cp))
        mixed = context_attention(q, k, v, cp, self.spread.context, document, meet, where.limits.mask_entries)
        return self.output(mixed.flatten(2))  # type: ignore[no-any-return]

    def initial_state(self, batch: int, max_len: int) -> KeyValueCache:
        """Return an empty cache with room for `max_len` tokens of `batch` samples."""
        weight = self.k.weight
        shape = (max_len, batch, weight.shape[0] // self.head_dim, self.head_dim)
        return KeyValueCache(weight.new_empty(shape), weight.new_empty(shape))

    def step(self, x: Float[Tensor, "s b h"], state: KeyValueCache) -> Float[Tensor, "s b h"]:
        """Attend from the next tokens to all that the cache holds, and add them to it.

        Raises:
            ValueError: if the cache has no room for them.
        """
        begin, end = state.length, state.length + x.shape[0]
        if end > state.keys.shape[0]:
            raise ValueError(f"the cache has room for {state.keys.shape[0]} tokens, {end} are needed")
        position = torch.arange(begin, end, device=x.device)
        q, k, v = self._heads(x, *rotary_angles(position, self.head_dim, self.rope_base, x.dtype))
        state.keys[begin:end], state.values[begin:end] = k, v
        state.length = end
        mixed = cached_attention(q, state.keys[:end].to(q.dtype), state.values[:end].to(q.dtype))
        return self.output(mixed.flatten(2))  # type: ignore[no-any-return]

    def _heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        columns = column_products(x, (self.q, self.k, self.v), self.spread.tp)
        q, k, v = (column.view(*column.shape[:2], -1, self.head_dim) for column in columns)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v


def copies_of_kv_heads(num_kv_heads: int, tp_size: int) -> int:
    """Return on how many neighbouring ranks of tp each key and value head lies.

    Raises:
        ValueError: if neither divides the other.
    """
    if num_kv_heads % tp_size == 0:
        return 1
    return divide(tp_size, num_kv_heads, what="tp", by="num_kv_heads")
