"""Multi-head attention with grouped key and value heads; by key with norms of heads, windows, a gate of the output.

q [s, b, n, d]     n heads, in groups that share one of the k key and value heads (GQA: k < n, MQA: k = 1)
k, v [s, b, k, d]  queries, keys and values are normalised, then queries and keys turned by their position, each by key

    output( mixed )                     or with a gate      output( mixed * sigmoid(gate x) )      gate [n*d, h]

Norms are of each head's d features (QK-norm; of v too: HybridNorm), or of all n*d features of a token (OLMo2): then the
mean square is taken over the ranks of tp.

Under tensor parallelism a rank has n/tp query heads and the k/tp key heads that they share; where k < tp, the
neighbouring ranks whose queries share a key head hold copies of it:

    x [s/tp, b, h] --gather--> [s, b, h] --q, k, v--> heads of this rank --output, sum--> [s/tp, b, h]

Under context parallelism s is s/cp all along, and only the attention itself communicates (`parallel/context/`).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from meshwright.kernels.attention.seen import Blocks
from meshwright.model.config import ModelConfig
from meshwright.model.kinds.mixers.attention import normed
from meshwright.model.making import Making
from meshwright.model.mixers.attention_cache import KeyValueCache
from meshwright.model.mixers.attention_core import ONE_RANK, USUAL_LOOK, AttentionCore, Look, Spread, look_of
from meshwright.model.mixers.attention_norms import NO_NORMS, HeadNorms, rms_norms
from meshwright.model.norms import NORMS
from meshwright.model.positions import Rope
from meshwright.parallel.fits import check_known, check_sizes
from meshwright.parallel.initialise import InitPolicy
from meshwright.parallel.tally import Tally
from meshwright.parallel.tensor.linear import ColumnLinear, RowLinear, column_products, divide
from meshwright.parallel.where import Where

__all__ = ["Attention", "HeadNorms", "Heads", "KeyValueCache", "Look", "Spread", "copies_of_kv_heads", "rms_norms"]


class Heads(NamedTuple):
    """How many heads there are, and how wide each is."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


class Products(NamedTuple):
    """Which products attention has besides q, k, v and output."""

    bias: frozenset[str] = frozenset()
    """Which of q, k, v, output and gate have a bias."""
    has_gate: bool = False
    """Whether the mixed values are multiplied by the sigmoid of a product of their own (Qwen3Next)."""


PLAIN_PRODUCTS = Products()


class Attention(nn.Module):
    """Self-attention over the tokens of a sample."""

    def __init__(
        self,
        hidden_size: int,
        heads: Heads,
        *,
        look: Look = USUAL_LOOK,
        norms: HeadNorms = NO_NORMS,
        products: Products = PLAIN_PRODUCTS,
        name: str = "attention",
        init: InitPolicy | None = None,
        spread: Spread = ONE_RANK,
    ) -> None:
        """Take global sizes; `name` is the layer's global name, under which weights of the scores are dropped.

        Raises:
            ValueError: if a size is 0, the key heads do not divide the query heads, tp divides neither, or `look` or
                the names in `products.bias` or `norms.of` are none.
        """
        super().__init__()
        check_sizes({"hidden_size": hidden_size, **heads._asdict()})
        num_heads, num_kv_heads, head_dim = heads
        tp, kv_copies = spread.tp, spread.kv_copies
        if num_heads % num_kv_heads != 0:
            raise ValueError(f"num_heads = {num_heads} does not divide by num_kv_heads = {num_kv_heads}")
        init, bias = init or InitPolicy(), products.bias
        norms.check()
        check_known("bias", bias, ("q", "k", "v", "output", "gate"))
        divide(num_heads, tp.size, what="num_heads", by=tp.name)
        divide(num_kv_heads * kv_copies.size, tp.size, what="num_kv_heads * copies", by=tp.name)
        self.head_dim, self.spread = head_dim, spread
        width, kv_width = num_heads * head_dim, num_kv_heads * head_dim
        inward, kv_inward = init.matrix(hidden_size, width), init.matrix(hidden_size, kv_width)
        self.q = ColumnLinear(hidden_size, width, rule=inward, bias="q" in bias, tp=tp)
        self.k = ColumnLinear(hidden_size, kv_width, rule=kv_inward, bias="k" in bias, tp=tp, copies=kv_copies)
        of_values = init.matrix(hidden_size, kv_width, is_value=True)
        self.v = ColumnLinear(hidden_size, kv_width, rule=of_values, bias="v" in bias, tp=tp, copies=kv_copies)
        self.gate: ColumnLinear | None = None
        if products.has_gate:
            self.gate = ColumnLinear(hidden_size, width, rule=inward, bias="gate" in bias, tp=tp)
        to_residual = init.matrix(width, hidden_size, to_residual=True)
        self.output = RowLinear(width, hidden_size, rule=to_residual, bias="output" in bias, tp=tp)
        self.q_norm = norms.made("q", heads.num_heads, head_dim, tp)
        self.k_norm = norms.made("k", heads.num_kv_heads, head_dim, tp, kv_copies)
        self.v_norm = norms.made("v", heads.num_kv_heads, head_dim, tp, kv_copies)
        if isinstance(look.position, Rope):
            look.position.turned(head_dim)
        self.core = AttentionCore(num_heads, look, name=name, init=init, spread=spread)

    def forward(
        self, x: Float[Tensor, "s_local b h"], where: Where, tally: Tally | None
    ) -> Float[Tensor, "s_local b h"]:
        """Let each token attend to what it sees of its sample (of its document, where `where` says so).

        Raises:
            ValueError: if `where` is of other tokens.
        """
        where.refuse_others(x)
        q, k, v, gate = self._heads(x)
        q, k = self.core.turned(q, k, where)
        return self._output(self.core(q, k, v, where), gate)

    def initial_state(self, batch: int, max_len: int | None = None) -> KeyValueCache:
        """Return an empty cache for `batch` samples of at most `max_len` tokens (None: it grows), or for a window's."""
        weight, d = self.k.weight, self.head_dim
        return self.core.empty_cache(batch, max_len, weight.shape[0] // d, (d, d), weight)

    def step(self, x: Float[Tensor, "s b h"], state: KeyValueCache) -> Float[Tensor, "s b h"]:
        """Attend from the next tokens to all that the cache holds, and add them to it.

        Raises:
            ValueError: if the cache has no room for them.
        """
        q, k, v, gate = self._heads(x)
        return self._output(self.core.step(q, k, v, state), gate)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        columns = [self.q, self.k, self.v, *([] if self.gate is None else [self.gate])]
        q, k, v, *gate = (
            torch.unflatten(column, 2, (-1, self.head_dim)) for column in column_products(x, columns, self.spread.tp)
        )
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        v = v if self.v_norm is None else self.v_norm(v)
        return q, k, v, gate[0] if gate else None

    def _output(self, mixed: Tensor, gate: Tensor | None) -> Tensor:
        if gate is not None:
            mixed = mixed * gate.sigmoid()
        return self.output(mixed.flatten(2))  # type: ignore[no-any-return]


def copies_of_kv_heads(num_kv_heads: int, tp_size: int) -> int:
    """Return on how many neighbouring ranks of tp each key and value head lies.

    Raises:
        ValueError: if neither divides the other.
    """
    if num_kv_heads % tp_size == 0:
        return 1
    return divide(tp_size, num_kv_heads, what="tp", by="num_kv_heads")


def make(config: ModelConfig, making: Making) -> Attention:
    """Return attention as the config has it."""
    return _made(config, making, look_of(config))


def make_sliding(config: ModelConfig, making: Making) -> Attention:
    """Return attention within a window."""
    table = config.sliding
    assert table is not None, "the checks let no L pass without a [model.sliding]"
    look = look_of(config, rope_base=table.rope_base)
    return _made(config, making, look._replace(window=table.window))


def make_block_sparse(config: ModelConfig, making: Making) -> Attention:
    """Return block-sparse attention."""
    table = config.block_sparse
    assert table is not None, "the checks let no B pass without a [model.block_sparse]"
    blocks = Blocks(table.block_size, table.local_blocks, table.leading_blocks)
    return _made(config, making, look_of(config)._replace(blocks=blocks))


def _made(config: ModelConfig, making: Making, look: Look) -> Attention:
    mesh = making.mesh
    copies = mesh.neighbours(copies_of_kv_heads(config.num_kv_heads, mesh.tp.size))
    bias = frozenset(config.bias) - {"ffn"} | ({"gate"} if "q" in config.bias else set())
    norm = NORMS["rmsnorm_zero_centred" if config.norm == "rmsnorm_zero_centred" else "rmsnorm"]
    of_heads = HeadNorms(
        frozenset(normed(config)),
        lambda size, tp: norm(size, config.norm_eps, tp=tp),
        config.qk_norm_over,
        config.norm_eps,
    )
    return Attention(
        config.hidden_size,
        Heads(config.num_heads, config.num_kv_heads, config.head_dim),
        look=look,
        norms=of_heads,
        products=Products(bias, config.attention_gate),
        name=making.layer,
        init=making.init,
        spread=Spread(mesh.tp, copies, mesh.cp, making.ways.context),
    )
