"""What a forward pass keeps for the backward, in bytes, counted from the config: a layer, a head, and a whole model.

Kept for each token that a mixer of this rank sees (there are b * s/cp):

    a part             what its kind says (its file in kinds/), the input of the norm before it among it: h/tp, held
                       between layers, in the stream's type
    embedding          h/tp          the input of a norm behind it, if there is one
    head               h/tp          the final norm's input                h/tp of its gradient; v h/tp of the matrix's
    a further token    a head and a layer of its own, and before the layer h/tp of the embedding, 2h/tp of both normed

Besides, for each sample or call of a layer, what does not grow with the tokens: states between ranks of cp, tables.

Under bf16 autocast the stream stays in fp32 and each product keeps a bf16 copy of its input of its own: three of the
normed input for q, k and v, two for gate and up; over tp they share one. A layer that is recomputed keeps its input
only, and while its turn is, what it would have kept. Besides, while they work, attention over cp holds blocks of other
ranks (the kind's `at_work`), and products over tp all ranks' tokens and their gradient (`gathered_bytes`).

While the loss is at work it holds a chunk of the logits (`kernels/limits.py`) in at least fp32; where products are
narrower also a copy of the chunk or the chunk's part of the matrix's gradient, under autocast besides the matrix's.

Norms' numbers of a few for each token are left out.
"""

from collections.abc import Collection, Iterator
from typing import NamedTuple

from meshwright.kernels.limits import USUAL
from meshwright.model.config import ModelConfig
from meshwright.model.kinds.depth import depth_kept, depth_of, depth_rows
from meshwright.model.kinds.kept import norm_input
from meshwright.model.kinds.kind import Degrees, Types
from meshwright.model.kinds.table import KINDS
from meshwright.model.pattern import LayerKinds
from meshwright.parallel.recompute.every import every_nth


class Held(NamedTuple):
    """Which layers a rank has, by number; with the head also those that predict further tokens, from num_layers on."""

    layers: frozenset[int]
    recomputed: frozenset[int] = frozenset()
    """Of all these, those that keep their input only."""
    has_head: bool = True
    has_embedding: bool = True


def held_by(
    config: ModelConfig, layers: Collection[int], every: int = 0, ends: tuple[bool, bool] = (True, True)
) -> Held:
    """Return what a rank with these layers has, with or without either end, and recomputes: every n-th, 0 is none.

    Layers that share their weights are one layer there, which is recomputed at each of its uses.
    """
    has_embedding, has_head = ends
    further = range(config.num_layers, config.num_layers + config.further_tokens) if has_head else ()
    own = [number for number in sorted(layers) if number < config.held_layers]
    again = frozenset(every_nth([*own, *further], every)) if every else frozenset[int]()
    recomputed = {number for number in layers if number % config.held_layers in again}
    return Held(frozenset(layers), frozenset(recomputed).union(again.intersection(further)), has_head, has_embedding)


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
    samples: int = 1,
    logits: int = USUAL.logits_on_gpu,
) -> ActivationBytes:
    """Return what a micro-batch of `tokens` (b * s, over all ranks) takes, of the whole model or of what is held.

    `samples` is b: some things are kept for each sample, however long. `logits` is how many the loss takes at a time.
    """
    held = held or held_by(config, range(config.num_layers))
    of_rank = tokens / degrees.cp
    kept = at_work = 0.0
    gathered = gathered_bytes(config, degrees, types.product + types.stream)
    for number, kinds in _layers(config, held):
        whole, again = layer_bytes(config, kinds, degrees, types), number in held.recomputed
        once = once_bytes(config, kinds, tokens // max(samples, 1), samples, degrees, types)
        working = max((KINDS[name].at_work(config, degrees, types) for name in kinds.names), default=0.0)
        kept += of_rank * config.hidden_size / degrees.tp * types.stream if again else of_rank * whole + once
        at_work = max(at_work, of_rank * (gathered + working) + (of_rank * whole + once if again else 0.0))
    if held.has_embedding and config.embedding_norm:
        kept += of_rank * config.hidden_size / degrees.tp * norm_input(config, types.stream, types)
    if held.has_head:
        kept += of_rank * head_bytes(config, degrees, types)
        kept += head_matrix_bytes(config, degrees, types) * (1 + config.further_tokens)
        if config.further_tokens:
            kept += of_rank * further_bytes(config, degrees, types)
            at_work = max(at_work, of_rank * 2 * gathered)  # of both side by side
        gathered = gathered_bytes(config, degrees, types.product + types.wide) * of_rank
        at_work = max(at_work, gathered + loss_bytes(config, of_rank, degrees, types, logits))
    return ActivationBytes(kept, at_work)


def _layers(config: ModelConfig, held: Held) -> Iterator[tuple[int, LayerKinds]]:
    """Yield what is held, by number, with the kinds of its parts."""
    kinds = config.layers
    yield from ((number, kinds[number]) for number in sorted(held.layers))
    if held.has_head:
        yield from ((config.num_layers + depth, config.last_layer) for depth in range(config.further_tokens))


def layer_bytes(config: ModelConfig, kinds: LayerKinds, degrees: Degrees, types: Types) -> float:
    """Return what a layer keeps for each token that its mixer sees on this rank."""
    whole = sum((KINDS[name].kept(config, degrees, types) for name in kinds.names), start=0.0)
    return depth_kept(config, degrees, types) + depth_of(config).capacity * whole if kinds.is_routed else whole


def once_bytes(
    config: ModelConfig, kinds: LayerKinds, length: int, samples: int, degrees: Degrees, types: Types
) -> float:
    """Return what a layer keeps for a call, one for some tokens has one for each sample; and for each sample."""
    calls, parts = 1, [KINDS[name] for name in kinds.names]
    if kinds.is_routed:
        calls, length = samples, depth_rows(config, length, degrees)
    of_sample = sum((part.kept_of_sample(config, degrees, types) for part in parts), start=0.0)
    return calls * sum(part.kept_once(config, length, degrees, types) for part in parts) + samples * of_sample


def further_bytes(config: ModelConfig, degrees: Degrees, types: Types) -> float:
    """Return what predicting all further tokens keeps beside their layers.

    Each has the embedding that is normed, both normed side by side, and a head of its own with a norm. What its other
    norm takes, the norm of the head before took too, if that has one; where norms make copies, each has its own.
    """
    depth, of_norm = config.further_tokens, norm_input(config, types.stream, types)
    again = depth if of_norm > types.stream else not config.final_norm
    each = 2 * of_norm + 2 * types.product + _of_loss(degrees, types)
    return config.hidden_size / degrees.tp * (depth * each + again * of_norm)


def head_bytes(config: ModelConfig, degrees: Degrees, types: Types) -> float:
    """Return what the final norm and the loss keep for each token that a mixer sees on this rank."""
    of_norm = norm_input(config, types.stream, types) if config.final_norm else 0
    return config.hidden_size / degrees.tp * (of_norm + _of_loss(degrees, types))


def _of_loss(degrees: Degrees, types: Types) -> int:
    """Return the bytes of each number of the gradient that the loss makes in the forward pass."""
    return types.wide if degrees.tp == 1 else types.stream


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


def gathered_bytes(config: ModelConfig, degrees: Degrees, width: int) -> float:
    """Return what products over tp hold besides, for each token: the gathered ones and their gradient."""
    return 0.0 if degrees.tp == 1 else float(config.hidden_size * width)
