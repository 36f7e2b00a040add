"""What a forward pass keeps for the backward, in bytes, counted from the config: a layer, a head, and a whole model.

Kept for each token that a mixer of this rank sees (there are b * s/cp), n and k heads of width d, hidden size h:

    a part's input     h/tp          what the norm before it was given; held between layers, in the stream's type
    attention          h/tp          the normed input, for the gradients of q, k and v
                       (n + 2k)d/tp  q, k, v as attention takes them       (n + k)d/tp more where queries are normed
                       nd/tp         its output                            n/tp log-sum-exps in at least fp32
    mlp                h/tp          the normed input; its products gate, up and gate * up: 3f/tp
    moe                h/tp          the normed input, for the router;     3f_shared/tp for shared experts
                       rows          each token comes top_k times: h of input, h of result, 3f_expert between
    head               h/tp          the final norm's input                h/tp of its gradient; v h/tp of the matrix's

Ulysses keeps q, k and v as they came, of all positions and n/cp heads: as many numbers, but k repeated to a multiple k'
of cp; and beside its output, which went back, that of attention, which its backward needs: nd/tp more.

Under bf16 autocast the stream stays in fp32 and each product keeps a bf16 copy of its input of its own: three of the
normed input for q, k and v, two for gate and up; over tp they share one. A layer that is recomputed keeps its input
only, and while its turn is, what it would have kept. Besides, while they work, attention over cp holds blocks of other
ranks (`context_bytes`), and products over tp all ranks' tokens and their gradient (`gathered_bytes`).

While the loss is at work it holds a chunk of the logits (`kernels/limits.py`) in at least fp32; where products are
narrower also a copy of the chunk or the chunk's part of the matrix's gradient, under autocast besides the matrix's.

Rows of experts lie wherever they were routed: a rank has its share of them on average, times etp where they are
shared, and more when routing is uneven. Norms' and routers' numbers of a few for each token are left out.
"""

from math import lcm
from typing import NamedTuple

from meshwright.kernels.limits import USUAL
from meshwright.model.config import ModelConfig
from meshwright.model.pattern import LayerKinds
from meshwright.parallel.config import ContextWay


class Types(NamedTuple):
    """Bytes of a number, by what it is of."""

    stream: int = 4
    """The residual stream between layers."""
    product: int = 4
    """What products take and give."""
    is_cast: bool = False
    """Whether every product keeps a copy of its input in its own type (autocast)."""

    @property
    def wide(self) -> int:
        """Return the bytes of what is summed in at least fp32."""
        return max(4, self.product)

    def inputs(self, products: int) -> int:
        """Return the bytes that so many products of one input keep of each number of it."""
        return self.product * (products if self.is_cast else 1)


class Degrees(NamedTuple):
    """Over how many ranks a sample and the matrices are spread, and how attention goes over those of a sample."""

    cp: int = 1
    tp: int = 1
    etp: int = 1
    context: ContextWay = "ring"

    def heads(self, config: ModelConfig) -> tuple[float, int, int]:
        """Return a rank's query heads, its key heads, and the key heads that it attends with (Ulysses repeats some)."""
        kv_heads = max(1, config.num_kv_heads // self.tp)
        return config.num_heads / self.tp, kv_heads, lcm(kv_heads, self.cp) if self.context == "ulysses" else kv_heads


class Held(NamedTuple):
    """Which layers a rank has, by number."""

    layers: frozenset[int]
    recomputed: frozenset[int] = frozenset()
    """Of these, those that keep their input only."""
    has_head: bool = True


class ActivationBytes(NamedTuple):
    """Bytes on one rank for one micro-batch."""

    kept: float
    """From the forward pass to the backward."""
    at_work: float
    """Besides, while the layer is at work that needs most."""

    @property
    def total(self) -> float:
        """Return the sum."""
        return self.kept + self.at_work


def activation_bytes(
    config: ModelConfig,
    tokens: int,
    degrees: Degrees,
    types: Types,
    held: Held | None = None,
    *,
    logits: int = USUAL.logits_on_gpu,
) -> ActivationBytes:
    """Return what a micro-batch of `tokens` (b * s, over all ranks) takes, of the whole model or of what is held.

    `logits` is how many of them the loss takes at a time.
    """
    held = held or Held(frozenset(range(config.num_layers)))
    of_rank, layers = tokens / degrees.cp, config.layers
    kept = at_work = 0.0
    gathered = gathered_bytes(config, degrees, types.product + types.stream)
    for number in held.layers:
        kinds = layers[number]
        whole, again = layer_bytes(config, kinds, degrees, types), number in held.recomputed
        kept += of_rank * (config.hidden_size / degrees.tp * types.stream if again else whole)
        working = context_bytes(config, degrees, types) if kinds.mixer == "attention" else 0.0
        at_work = max(at_work, of_rank * (gathered + working + (whole if again else 0.0)))
    if held.has_head:
        kept += head_bytes(config, degrees, types) * of_rank + head_matrix_bytes(config, degrees, types)
        gathered = gathered_bytes(config, degrees, types.product + types.wide) * of_rank
        at_work = max(at_work, gathered + loss_bytes(config, of_rank, degrees, types, logits))
    return ActivationBytes(kept, at_work)


def layer_bytes(config: ModelConfig, kinds: LayerKinds, degrees: Degrees, types: Types) -> float:
    """Return what a layer keeps for each token that its mixer sees on this rank."""
    found = 0.0
    if kinds.mixer == "attention":
        found += _attention(config, degrees, types)
    if kinds.feedforward == "mlp":
        found += config.hidden_size / degrees.tp * types.stream + _mlp(config, config.ffn_hidden_size, degrees, types)
    if kinds.feedforward == "moe":
        found += _moe(config, degrees, types)
    return found


def head_bytes(config: ModelConfig, degrees: Degrees, types: Types) -> float:
    """Return what the final norm and the loss keep for each token that a mixer sees on this rank."""
    of_gradient = types.wide if degrees.tp == 1 else types.stream
    return config.hidden_size / degrees.tp * (types.stream + of_gradient)


def head_matrix_bytes(config: ModelConfig, degrees: Degrees, types: Types) -> float:
    """Return what the loss keeps for any number of tokens: its matrix's gradient, made in the forward pass."""
    return config.vocab_size * config.hidden_size / degrees.tp * types.wide


def loss_bytes(config: ModelConfig, tokens: float, degrees: Degrees, types: Types, logits: int) -> float:
    """Return what the loss of so many tokens holds besides; a chunk is whole tokens, of this rank's vocabulary.

    Nothing is counted of a vocabulary whose size nobody knows yet, 0.
    """
    rows = -(-config.vocab_size // degrees.tp)
    chunk, matrix = min(tokens, float(max(1, logits // max(1, rows)))) * rows, rows * config.hidden_size
    if types.product >= types.wide:
        return chunk * types.wide
    narrow = types.product * (matrix if types.is_cast else 0)
    return narrow + max(chunk * (types.wide + types.product), (chunk + matrix) * types.product)


def context_bytes(config: ModelConfig, degrees: Degrees, types: Types) -> float:
    """Return what attention over cp holds, for each token, beyond what attention on one rank does.

    That holds at its peak, in its backward, the gradients of its output, q, k and v: 2n + 2k heads. The log-sum-exps
    of a chunk are left out.
    """
    if degrees.cp == 1:
        return 0.0
    way = _ring if degrees.context == "ring" else _ulysses
    return way(degrees, *degrees.heads(config), types) * config.head_dim


def _ring(degrees: Degrees, n: float, k: int, _: int, types: Types) -> float:
    """Forward two blocks of keys and values, and a merge of four outputs, the old, the new and two on the way.

    Backward the gradient of q, three blocks of gradients and two of keys and values (of two ranks one, as the last step
    sends none); of another rank's block half the keys, or half the queries, meet, and have gradients of their own.
    """
    forward = 4 * k * types.product + 4 * n * types.wide - (2 * n + 2 * k) * types.product
    blocks = 4 * k if degrees.cp > 2 else 2 * k
    return max(forward, (blocks - min(k, n / 2)) * types.product + (6 * k + n) * types.wide)


def _ulysses(_: Degrees, n: float, k: int, k_sent: int, types: Types) -> float:
    """The heads of q, k and v are there before an exchange, as it takes them, and as it brings them.

    The backward has the gradients of what went back and of what came, then three times those of q, k and v, when the
    attention's own tensors are gone. What is kept, and what attention on one rank holds, is taken off.
    """
    own, sent = n + 2 * k, n + 2 * k_sent
    repeated = 2 * k_sent if k_sent > k else 0
    there = max(own + repeated + 3 * sent, 2 * sent + 4 * n, 3 * sent + 2 * n)
    return (there - (sent + 2 * n) - (n + own)) * types.product


def gathered_bytes(config: ModelConfig, degrees: Degrees, width: int) -> float:
    """Return what products over tp hold besides, for each token: the gathered ones and their gradient."""
    return 0.0 if degrees.tp == 1 else float(config.hidden_size * width)


def _input(config: ModelConfig, products: int, degrees: Degrees, types: Types) -> float:
    kept = types.inputs(products) if degrees.tp == 1 else types.product
    return config.hidden_size / degrees.tp * kept


def _attention(config: ModelConfig, degrees: Degrees, types: Types) -> float:
    heads, kv_heads, kv_sent = degrees.heads(config)
    own = 2 * heads + 2 * kv_sent + (heads + kv_heads if config.qk_norm else 0)
    if degrees.cp > 1 and degrees.context == "ulysses":
        own += heads  # of the output, as it went back
    stream = config.hidden_size / degrees.tp * types.stream
    return stream + _input(config, 3, degrees, types) + own * config.head_dim * types.product + heads * types.wide


def _mlp(config: ModelConfig, width: int, degrees: Degrees, types: Types) -> float:
    return _input(config, 2, degrees, types) + 3 * width / degrees.tp * types.product


def _moe(config: ModelConfig, degrees: Degrees, types: Types) -> float:
    assert config.moe is not None, "the checks see to it that E has its table"
    moe, h = config.moe, config.hidden_size
    routed = (
        moe.top_k / degrees.tp * (h * degrees.etp * types.inputs(2) + (h + 3 * moe.expert_hidden_size) * types.product)
    )
    found = 2 * h / degrees.tp * types.stream + routed  # the norm's input and, for the router, its output
    if moe.num_shared_experts:
        shared = _mlp(config, moe.shared_hidden_size, degrees, types)
        # The shared experts take the very tensor that the router does, unless they keep a copy.
        found += shared - (0.0 if types.is_cast else _input(config, 2, degrees, types))
    return found
