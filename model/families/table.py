"""Rows and keys that families share: the stack, linear layers, attention, MLPs, experts, RoPE.

Names of a Llama, from which most others differ by a word (`Names`):

    ours                                foreign
    embedding.weight                    model.embed_tokens.weight
    layers.N.mixer.norm.weight          model.layers.N.input_layernorm.weight
    layers.N.mixer.part.q.weight        model.layers.N.self_attn.q_proj.weight       (k, v; output -> o_proj)
    layers.N.mixer.part.q_norm.weight   model.layers.N.self_attn.q_norm.weight       (k_norm)
    layers.N.feedforward.norm.weight    model.layers.N.post_attention_layernorm.weight
    final_norm.weight                   model.norm.weight
    output.weight                       lm_head.weight                               (absent when tied)

What stands at `part` a family says by kind: a function of (config, our name, their name of the layer).
"""

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from meshwright.model.config import ModelConfig
from meshwright.model.families.family import Row, same
from meshwright.model.families.rope import rope_keys, rope_to_ours
from meshwright.model.kinds.feedforward.moe import MoeConfig
from meshwright.model.kinds.norms import norm_shapes
from meshwright.model.kinds.table import KINDS

ATTENTION_BIASES = ("q", "k", "v", "output")
ATTENTION_NAMES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "output": "o_proj"}
MLP_NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}

NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")

PartRows = Callable[[ModelConfig, str, str], Iterator[Row]]


class Names(NamedTuple):
    """What a family calls what stands around the parts."""

    embedding: str = "model.embed_tokens"
    layer: str = "model.layers"
    before: Mapping[str, str] = {"mixer": "input_layernorm", "feedforward": "post_attention_layernorm"}
    """The norms before mixers and feed-forwards."""
    behind: Mapping[str, str] = {}
    """Those behind them."""
    final: str = "model.norm"
    output: str = "lm_head"
    embedding_norm: str = ""
    positions: str = ""


LLAMA_NAMES = Names()


def stack_rows(config: ModelConfig, parts: Mapping[str, PartRows], names: Names = LLAMA_NAMES) -> Iterator[Row]:
    """Yield the rows of a whole model; `parts` says by kind what a part is made of."""
    v, h = config.vocab_size, config.hidden_size
    yield same("embedding.weight", f"{names.embedding}.weight", (v, h))
    if config.position == "learned":
        yield same("positions.weight", f"{names.positions}.weight", (config.max_positions, h))
    if config.embedding_norm:
        yield from norm_rows(config, "embedding_norm", names.embedding_norm)
    for n, kinds in enumerate(config.layers):
        ours, theirs = f"layers.{n}", f"{names.layer}.{n}"
        for name in kinds.names:
            place = KINDS[name].place
            form = config.forms[place]
            if form.before:
                yield from norm_rows(config, f"{ours}.{place}.norm", f"{theirs}.{names.before[place]}")
            yield from parts[name](config, f"{ours}.{place}.part", theirs)
            if "post_norm" in form.names:
                yield from norm_rows(config, f"{ours}.{place}.post_norm", f"{theirs}.{names.behind[place]}")
    yield from norm_rows(config, "final_norm", names.final)
    if not config.tie_embeddings:
        yield same("output.weight", f"{names.output}.weight", (v, h))


def norm_rows(config: ModelConfig, ours: str, theirs: str) -> Iterator[Row]:
    """Yield the weight of a norm over the stream, and its bias if it has one."""
    for name, shape in norm_shapes(config.norm, config.hidden_size):
        yield same(f"{ours}.{name}", f"{theirs}.{name}", shape)


def linear_rows(ours: str, theirs: str, shape: tuple[int, ...], *, bias: bool = False) -> Iterator[Row]:
    """Yield the weight of a product that both sides hold alike, and its bias."""
    yield same(f"{ours}.weight", f"{theirs}.weight", shape)
    if bias:
        yield same(f"{ours}.bias", f"{theirs}.bias", shape[:1])


def attention_rows(config: ModelConfig, ours: str, theirs: str) -> Iterator[Row]:
    """Yield one attention part's rows, with the biases that it has; `theirs` is the layer."""
    h, d = config.hidden_size, config.head_dim
    q, kv = config.num_heads * d, config.num_kv_heads * d
    for part, shape in {"q": (q, h), "k": (kv, h), "v": (kv, h), "output": (h, q)}.items():
        yield from linear_rows(
            f"{ours}.{part}", f"{theirs}.self_attn.{ATTENTION_NAMES[part]}", shape, bias=part in config.bias
        )


def normed_attention_rows(config: ModelConfig, ours: str, theirs: str) -> Iterator[Row]:
    """Yield the same with a norm of each head's queries and keys."""
    yield from attention_rows(config, ours, theirs)
    for part in ("q_norm", "k_norm"):
        yield same(f"{ours}.{part}.weight", f"{theirs}.self_attn.{part}.weight", (config.head_dim,))


def mlp_rows(config: ModelConfig, ours: str, theirs: str) -> Iterator[Row]:
    """Yield the rows of one gated MLP, `mlp` in the layer `theirs`."""
    yield from gated_rows(config, ours, f"{theirs}.mlp", config.ffn_hidden_size)


def gated_rows(config: ModelConfig, ours: str, theirs: str, width: int) -> Iterator[Row]:
    """Yield a gated MLP's rows under its own name there."""
    h, f = config.hidden_size, width
    for part, shape in {"gate": (f, h), "up": (f, h), "down": (h, f)}.items():
        yield from linear_rows(f"{ours}.{part}", f"{theirs}.{MLP_NAMES[part]}", shape, bias="ffn" in config.bias)


def expert_rows(
    config: ModelConfig, ours: str, theirs: str, names: Mapping[str, str] = MLP_NAMES, block: str = "mlp"
) -> Iterator[Row]:
    """Yield a MoE layer's router and each expert's three matrices; `names` says what the family calls these."""
    moe = experts_of(config)
    h, f, e = config.hidden_size, moe.expert_hidden_size, moe.num_experts
    yield same(f"{ours}.router.weight", f"{theirs}.{block}.gate.weight", (e, h))
    for index in range(e):
        for part, shape in {"gate": (f, h), "up": (f, h), "down": (h, f)}.items():
            name = f"{theirs}.{block}.experts.{index}.{names[part]}.weight"
            yield same(f"{ours}.experts.{part}", name, shape, index)


def experts_of(config: ModelConfig) -> MoeConfig:
    """Return the [model.moe] table of a model that has experts."""
    assert config.moe is not None, "the checks let no E pass without a [model.moe]"
    return config.moe


def size_keys(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of sizes and first values that nearly all families call by the same names."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
    }


def rope_attention_keys(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of attention, RoPE's in the new and in the old spelling."""
    return {
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        **rope_keys(config),
    }


def common_keys(config: ModelConfig) -> dict[str, Any]:
    """Return the foreign keys that all Llama-like families share."""
    return {
        **size_keys(config),
        **rope_attention_keys(config),
        "rms_norm_eps": config.norm_eps,
    }


def sizes_to_ours(foreign: Mapping[str, Any], *, tied: bool = False) -> dict[str, Any]:
    """Return our keys of sizes and first values; `tied` is the class's own default."""
    return {
        "vocab_size": foreign["vocab_size"],
        "hidden_size": foreign["hidden_size"],
        "num_layers": foreign["num_hidden_layers"],
        "init_std": float(foreign.get("initializer_range", 0.02)),
        "tie_embeddings": bool(foreign.get("tie_word_embeddings", tied)),
    }


def attention_to_ours(
    foreign: Mapping[str, Any], default_rope_base: float, default_rope_fraction: float | None = None
) -> dict[str, Any]:
    """Return our keys of attention with RoPE."""
    num_heads = foreign["num_attention_heads"]
    return {
        "num_heads": num_heads,
        "num_kv_heads": foreign.get("num_key_value_heads") or num_heads,
        # Where nothing divides, 0: the checks of our configuration tell it.
        "head_dim": foreign.get("head_dim")
        or (0 if foreign["hidden_size"] % num_heads else foreign["hidden_size"] // num_heads),
        **rope_to_ours(foreign, default_rope_base, default_rope_fraction),
    }


def common_keys_to_ours(
    foreign: Mapping[str, Any],
    *,
    default_rope_base: float,
    default_rope_fraction: float | None = None,
    tied: bool = False,
) -> dict[str, Any]:
    """Return the keys of our [model] table that all Llama-like families share."""
    return {
        **sizes_to_ours(foreign, tied=tied),
        **attention_to_ours(foreign, default_rope_base, default_rope_fraction),
        "norm_eps": float(foreign.get("rms_norm_eps", 1e-6)),
    }


def balancing_to_ours(foreign: Mapping[str, Any], usual: float) -> float:
    """Return the weight of the load-balancing loss; `usual` is the class's own."""
    given = foreign.get("router_aux_loss_coef", usual)
    return usual if given is None else float(given)


def with_defaults(foreign: Mapping[str, Any], **defaults: Any) -> Mapping[str, Any]:
    """Return the keys with a class's own values where a file does not name them."""
    return ChainMap(foreign, defaults)  # type: ignore[arg-type]  # nothing is written to it


def without(foreign: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """Return the keys with some of them null, which the class does not look at."""
    return ChainMap(dict.fromkeys(keys), foreign)  # type: ignore[arg-type]


def full_attention_alone(foreign: Mapping[str, Any]) -> None:
    """Check that no layer has a window.

    Raises:
        ValueError: if one has.
    """
    others = sorted(set(foreign.get("layer_types") or []) - {"full_attention"})
    if others:
        raise ValueError(f"layer_types: has {others}; only 'full_attention' can be read")


def attention_bias_parts(foreign: Mapping[str, Any]) -> list[str]:
    """Return our names of the biases that a foreign `attention_bias` stands for."""
    return list(ATTENTION_BIASES) if foreign.get("attention_bias", False) else []


def shortest_pattern(layers: Sequence[str]) -> str:
    """Return the shortest pattern that gives each layer its letters.

    A period, or where only few layers differ from the most common one, `*E @0-2 *-`.
    """
    for period in range(1, len(layers) + 1):
        if len(layers) % period == 0 and list(layers[:period]) * (len(layers) // period) == list(layers):
            break
    whole = "".join(layers[:period])
    usual = max(set(layers), key=lambda letters: (list(layers).count(letters), letters))
    others = sorted(set(layers) - {usual})
    placed = usual + "".join(
        f" @{_numbers([n for n, it in enumerate(layers) if it == other])} {other}" for other in others
    )
    return min(whole, placed, key=len)


def _numbers(numbers: list[int]) -> str:
    """Return `0-2,5` for 0, 1, 2 and 5."""
    pieces: list[str] = []
    start = last = numbers[0]
    for number in [*numbers[1:], -1]:
        if number == last + 1:
            last = number
            continue
        pieces.append(str(start) if start == last else f"{start}-{last}")
        start = last = number
    return ",".join(pieces)
