"""Attention as a description: heads, their weights, what they cost and keep (module: mixers/attention.py).

Its keys stand in [model]. Parameters (n*d = num_heads * head_dim, k*d = num_kv_heads * head_dim):

    q [n*d, h]   k, v [k*d, h]   output [h, n*d]   biases by key   q_norm, k_norm [d] with qk_norm
    gate [n*d, h] with attention_gate      q_norm [n*d], k_norm [k*d] with qk_norm over tokens
    v_norm [d] too with hybrid_norm        core.bias.table [buckets, n] with T5's positions

Kept for each token that a mixer of this rank sees, n and k heads of width d:

    h/tp          the norm's input            h/tp   the normed input, for the gradients of q, k and v
    (n + 2k)d/tp  q, k, v as attention takes them       (n + k)d/tp more where queries are normed
    nd/tp         its output                            n/tp log-sum-exps in at least fp32
    2nd/tp more with a gate: its sigmoid, and what it made of the output

Ulysses keeps q, k and v as they came, of all positions and n/cp heads: as many numbers, but k repeated to a multiple k'
of cp; and beside its output, which went back, that of attention, which its backward needs: nd/tp more.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import TYPE_CHECKING, Any, ClassVar

from meshwright.model.kinds.kept import norm_inputs, normed_input
from meshwright.model.kinds.kind import OVER_TP, Choose, Cut, Degrees, Kind, Named, Need, Types, Weight, matrix, vector
from meshwright.model.kinds.mixers.positions import bucket_problems, stretching_problems
from meshwright.parallel.fits import divisors, nearest

if TYPE_CHECKING:
    from meshwright.model.config import ModelConfig


# Of every attention but latent attention, which has rotary features of its own.
LOOK_KEYS = frozenset(
    {
        "num_heads", "head_dim", "position", "rope_base", "rope_fraction", "rope_scaling", "t5_buckets",
        "t5_max_distance", "attention_scale", "attention_dropout",
    }
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class AttentionKind(Kind):
    """Multi-head attention with grouped key and value heads."""

    reads: ClassVar[frozenset[str]] = LOOK_KEYS | {
        "num_kv_heads", "qk_norm", "qk_norm_over", "attention_gate", "bias.q", "bias.k", "bias.v", "bias.output"
    }  # fmt: skip

    def reads_of(self, model: ModelConfig) -> frozenset[str]:
        """Return them, and norm_eps where queries and keys are normalised."""
        return self.reads | {"norm_eps"} if normed(model) else self.reads

    def weights(self, model: ModelConfig) -> Named:
        """Yield q, k, v, output, and the norms of queries and keys."""
        h, queries, keys = model.hidden_size, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        of_keys = Cut(("tp",), units=model.num_kv_heads)
        matrices = {
            "q": (matrix(queries, h, OVER_TP), vector(queries, OVER_TP)),
            "k": (matrix(keys, h, of_keys), vector(keys, of_keys)),
            "v": (matrix(keys, h, of_keys), vector(keys, of_keys)),
            "gate": (matrix(queries, h, OVER_TP), vector(queries, OVER_TP)),
            "output": (matrix(h, queries, OVER_TP), vector(h)),
        }
        if not model.attention_gate:
            del matrices["gate"]
        for name, (weight, bias) in matrices.items():
            yield f"{name}.weight", weight
            if ("q" if name == "gate" else name) in model.bias:
                yield f"{name}.bias", bias
        over_tokens = {"q": vector(queries, OVER_TP), "k": vector(keys, of_keys)}
        for name in normed(model):
            is_over_tokens = model.qk_norm_over == "tokens" and name in over_tokens
            yield f"{name}_norm.weight", over_tokens[name] if is_over_tokens else vector(model.head_dim)
        yield from position_weights(model)

    def mixing_flops(self, model: ModelConfig, seq_len: int, *, causal: bool) -> float:
        """Return the operations of the scores and of the values' sum."""
        positions = (seq_len + 1) / 2 if causal else float(seq_len)
        return 4.0 * model.num_heads * model.head_dim * positions

    def kept(self, model: ModelConfig, degrees: Degrees, types: Types) -> float:
        """Return what stands at the head of this file."""
        heads, kv_heads, kv_sent = heads_of_rank(model, degrees)
        own = 2 * heads + 2 * kv_sent + 2 * heads * model.attention_gate
        for name in normed(model):
            size = heads if name == "q" else kv_heads
            is_over_tokens = model.qk_norm_over == "tokens" and name != "v"
            # Over tokens what is normed, and what is scaled by the weight, both in at least fp32.
            own += 2 * size * types.wide / types.product if is_over_tokens else size
        if degrees.cp > 1 and degrees.context == "ulysses":
            own += heads  # of the output, as it went back
        norms, products = norm_inputs(model, self.place, degrees, types), 3 + model.attention_gate
        sums = own * model.head_dim * types.product + heads * types.wide
        return norms + normed_input(model, products, degrees, types) + sums

    def at_work(self, model: ModelConfig, degrees: Degrees, types: Types) -> float:
        """Return what attention over cp holds.

        On one rank it holds at its peak, in its backward, the gradients of its output, q, k and v: 2n + 2k heads. The
        log-sum-exps of a chunk are left out.
        """
        if degrees.cp == 1:
            return 0.0
        way = _ring if degrees.context == "ring" else _ulysses
        return way(degrees, *heads_of_rank(model, degrees), types) * model.head_dim

    def state_bytes(self, model: ModelConfig, tokens: int, width: int) -> float:
        """Return the bytes of the keys and values of all tokens."""
        return 2.0 * model.num_kv_heads * model.head_dim * tokens * width

    def problems(self, model: ModelConfig, choose: Choose) -> list[str]:
        """Return what is wrong with the numbers and the width of the heads."""
        return [*attention_head_problems(model, choose), *position_problems(model)]

    def needs(self, model: ModelConfig) -> list[Need]:
        """Return that tp divides the heads, and divides the key heads or is a multiple of them."""
        heads, kv_heads = model.num_heads, model.num_kv_heads
        if not heads:
            return []  # told as missing
        found = [Need("heads", "model.num_heads", heads)]
        if heads % kv_heads == 0:  # if not, other key heads are needed, and those are what counts
            found.append(Need("tp", "model.num_kv_heads", kv_heads, or_multiple=True))
        return found


def attention_head_problems(model: ModelConfig, choose: Choose) -> list[str]:
    """Return what is wrong with num_heads, num_kv_heads and head_dim."""
    if not model.num_heads:
        return ["model.num_heads: is missing; a pattern with attention needs it, or a preset that has it"]
    found = []
    if model.head_dim == 0:
        fits = nearest(choose("model.num_heads", _with_other_heads(model)), model.num_heads)
        width = 2 * max(1, round(model.hidden_size / model.num_heads / 2))
        found.append(
            f"model.num_heads = {model.num_heads}: must divide model.hidden_size = {model.hidden_size}, or"
            f" model.head_dim be given; " + (f"one of {fits} would fit" if fits else f"head_dim = {width} would fit")
        )
    elif model.head_dim % 2 != 0 and model.position == "rope" and model.rope_fraction == 1.0:
        fits = [size for size in (model.head_dim - 1, model.head_dim + 1) if size > 0]
        found.append(
            f"model.head_dim = {model.head_dim}: must be even, because RoPE turns pairs;"
            f" {' or '.join(map(str, fits))} would fit"
        )
    if model.num_heads % model.num_kv_heads != 0:
        others = {size: model.model_copy(update={"num_kv_heads": size}) for size in divisors(model.num_heads)}
        fits = choose("model.num_kv_heads", others)
        found.append(
            f"model.num_kv_heads = {model.num_kv_heads}: must divide model.num_heads = {model.num_heads};"
            f" one of {nearest(fits, model.num_kv_heads)} would fit"
        )
    return found


def position_problems(model: ModelConfig) -> list[str]:
    """Return what is wrong with the keys of positions and norms."""
    found, turned = [], int(model.head_dim * model.rope_fraction)
    if model.position == "rope" and model.rope_fraction < 1.0 and (turned < 2 or turned % 2):
        found.append(
            f"model.rope_fraction = {model.rope_fraction}: turns {turned} of model.head_dim ="
            f" {model.head_dim} features, which must be an even number; 0.5 or 1.0 would fit most"
        )
    found += scaling_problems(model, turned, f"model.head_dim = {model.head_dim} * rope_fraction")
    if model.position == "t5":
        found += bucket_problems(model.t5_buckets, model.t5_max_distance, ("model.t5_buckets", "model.t5_max_distance"))
    if model.qk_norm_over == "tokens" and (model.norm == "rmsnorm_zero_centred" or "v" in normed(model)):
        found.append('model.qk_norm_over = "tokens": goes with plain RMSNorms of q and k alone; "heads" would fit')
    return found


def scaling_problems(model: ModelConfig, turned: int, key: str) -> list[str]:
    """Return what is wrong with [model.rope_scaling] where `turned` features of a head are, which follow from `key`."""
    if model.rope_scaling is None:
        return []
    of_windows = model.sliding.rope_base if model.sliding else None
    bases = {"model.rope_base": model.rope_base, "model.sliding.rope_base": of_windows}
    return stretching_problems(model.rope_scaling, turned, key, bases, "model.rope_scaling.")


def normed(model: ModelConfig) -> tuple[str, ...]:
    """Return which of q, k and v are normalised."""
    if model.norm_placement == "hybrid_norm":
        return ("q", "k", "v")
    return ("q", "k") if model.qk_norm else ()


def position_weights(model: ModelConfig) -> Named:
    """Yield the table of T5's biases."""
    if model.position == "t5":
        yield "core.bias.table", Weight((model.t5_buckets, model.num_heads), OVER_TP)


def _with_other_heads(model: ModelConfig) -> dict[int, Any]:
    """Return the config with each number of heads of an even width, and what is filled in from it."""
    found = {}
    for size in divisors(model.hidden_size):
        if model.hidden_size // size % 2 == 0:
            kv_heads = size if model.num_kv_heads == model.num_heads else model.num_kv_heads
            sizes = {"num_heads": size, "num_kv_heads": kv_heads, "head_dim": model.hidden_size // size}
            found[size] = model.model_copy(update=sizes)
    return found


def heads_of_rank(model: ModelConfig, degrees: Degrees) -> tuple[float, int, int]:
    """Return a rank's query heads, its key heads, and the key heads that it attends with (Ulysses repeats some)."""
    kv_heads = max(1, model.num_kv_heads // degrees.tp)
    sent = lcm(kv_heads, degrees.cp) if degrees.context == "ulysses" else kv_heads
    return model.num_heads / degrees.tp, kv_heads, sent


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
