"""Rows and keys that the Llama-like families share: embedding, attention, norms, RoPE.

All of them are pre-norm stacks of attention and feed-forward with RMSNorm and half-split RoPE, as ours:

    ours                                foreign
    embedding.weight                    model.embed_tokens.weight
    layers.N.mixer.norm.weight          model.layers.N.input_layernorm.weight
    layers.N.mixer.part.q.weight        model.layers.N.self_attn.q_proj.weight       (k, v; output -> o_proj)
    layers.N.mixer.part.q_norm.weight   model.layers.N.self_attn.q_norm.weight       (k_norm)
    layers.N.feedforward.norm.weight    model.layers.N.post_attention_layernorm.weight
    final_norm.weight                   model.norm.weight
    output.weight                       lm_head.weight                               (absent when tied)

What stands at `layers.N.feedforward.part` differs and is the families' own.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from meshwright.model.config import ModelConfig, MoeConfig
from meshwright.model.families.family import Row
from meshwright.model.pattern import LayerKinds

ATTENTION_BIASES = ("q", "k", "v", "output")
ATTENTION_NAMES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "output": "o_proj"}
MLP_NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}

NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")

FeedforwardRows = Callable[[ModelConfig, int, LayerKinds], list[Row]]


def stack_rows(config: ModelConfig, feedforward_rows: FeedforwardRows) -> list[Row]:
    """Return the rows of a whole model; the caller says what a layer's feed-forward is made of."""
    v, h = config.vocab_size, config.hidden_size
    rows = [Row("embedding.weight", None, "model.embed_tokens.weight", (v, h))]
    for n, kinds in enumerate(config.layers):
        ours, theirs = f"layers.{n}", f"model.layers.{n}"
        rows.append(Row(f"{ours}.mixer.norm.weight", None, f"{theirs}.input_layernorm.weight", (h,)))
        rows += attention_rows(config, f"{ours}.mixer.part", f"{theirs}.self_attn")
        rows.append(Row(f"{ours}.feedforward.norm.weight", None, f"{theirs}.post_attention_layernorm.weight", (h,)))
        rows += feedforward_rows(config, n, kinds)
    rows.append(Row("final_norm.weight", None, "model.norm.weight", (h,)))
    if not config.tie_embeddings:
        rows.append(Row("output.weight", None, "lm_head.weight", (v, h)))
    return rows


def fewest_tensors(config: ModelConfig) -> int:
    """Return a number that `stack_rows` has at least as many rows as, without making any."""
    experts = config.moe.num_experts * 3 * config.num_moe_layers if config.moe is not None else 0
    return config.num_layers + experts


def attention_rows(config: ModelConfig, ours: str, theirs: str) -> list[Row]:
    """Return one attention layer's rows, with the biases and per-head norms that it has."""
    h, d = config.hidden_size, config.head_dim
    q, kv = config.num_heads * d, config.num_kv_heads * d
    shapes = {"q": (q, h), "k": (kv, h), "v": (kv, h), "output": (h, q)}
    rows: list[Row] = []
    for part, shape in shapes.items():
        rows.append(Row(f"{ours}.{part}.weight", None, f"{theirs}.{ATTENTION_NAMES[part]}.weight", shape))
        if part in config.bias:
            rows.append(Row(f"{ours}.{part}.bias", None, f"{theirs}.{ATTENTION_NAMES[part]}.bias", shape[:1]))
    if config.qk_norm:
        rows += [Row(f"{ours}.{part}.weight", None, f"{theirs}.{part}.weight", (d,)) for part in ("q_norm", "k_norm")]
    return rows


def mlp_rows(config: ModelConfig, ours: str, theirs: str) -> list[Row]:
    """Return one SwiGLU MLP's rows."""
    h, f = config.hidden_size, config.ffn_hidden_size
    rows: list[Row] = []
    for part, shape in {"gate": (f, h), "up": (f, h), "down": (h, f)}.items():
        rows.append(Row(f"{ours}.{part}.weight", None, f"{theirs}.{MLP_NAMES[part]}.weight", shape))
        if "ffn" in config.bias:
            rows.append(Row(f"{ours}.{part}.bias", None, f"{theirs}.{MLP_NAMES[part]}.bias", shape[:1]))
    return rows


def expert_rows(config: ModelConfig, ours: str, theirs: str, names: Mapping[str, str]) -> list[Row]:
    """Return a MoE layer's router and each expert's three matrices; `names` says what the family calls these."""
    moe = experts_of(config)
    h, f, e = config.hidden_size, moe.expert_hidden_size, moe.num_experts
    rows = [Row(f"{ours}.router.weight", None, f"{theirs}.gate.weight", (e, h))]
    for index in range(e):
        for part, shape in {"gate": (f, h), "up": (f, h), "down": (h, f)}.items():
            name = f"{theirs}.experts.{index}.{names[part]}.weight"
            rows.append(Row(f"{ours}.experts.{part}", index, name, shape))
    return rows


def common_keys(config: ModelConfig) -> dict[str, Any]:
    """Return the foreign keys that all these families share, RoPE's in the new and in the old spelling."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "rope_theta": config.rope_base,
    }


def common_keys_to_ours(foreign: Mapping[str, Any], *, default_rope_base: float) -> dict[str, Any]:
    """Return the keys of our [model] table that all these families share.

    Raises:
        ValueError: with all that the configuration asks for and we do not compute.
    """
    rope = foreign.get("rope_parameters") or foreign.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    problems = []
    if rope_type != "default":
        problems.append(f"rope_type = {rope_type!r}: only 'default' RoPE, without scaling, can be read")
    if foreign.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act = {foreign['hidden_act']!r}: only 'silu' can be read")
    if foreign.get("sliding_window") is not None and foreign.get("use_sliding_window", True):
        problems.append(
            f"sliding_window = {foreign['sliding_window']}: only attention to all earlier tokens can be read"
        )
    if foreign.get("attention_dropout", 0.0) != 0.0:
        problems.append(f"attention_dropout = {foreign['attention_dropout']}: only 0 can be read")
    if problems:
        raise ValueError("; ".join(problems))
    hidden_size, num_heads = foreign["hidden_size"], foreign["num_attention_heads"]
    return {
        "vocab_size": foreign["vocab_size"],
        "hidden_size": hidden_size,
        "num_layers": foreign["num_hidden_layers"],
        "num_heads": num_heads,
        "num_kv_heads": foreign.get("num_key_value_heads") or num_heads,
        "head_dim": foreign.get("head_dim") or hidden_size // num_heads,
        "norm_eps": float(foreign.get("rms_norm_eps", 1e-6)),
        "init_std": float(foreign.get("initializer_range", 0.02)),
        "tie_embeddings": bool(foreign.get("tie_word_embeddings", False)),
        "rope_base": float(rope.get("rope_theta", foreign.get("rope_theta", default_rope_base))),
    }


def common_reasons(config: ModelConfig) -> list[str]:
    """Return what none of these families can represent, each with the key, the value and a way out."""
    layers = config.layers
    reasons = []
    other = sorted({kinds.mixer for kinds in layers if kinds.mixer not in (None, "attention")})
    if other:
        reasons.append(
            f"model.pattern = {config.pattern!r}: the mixer {', '.join(other)} has no place beside attention here; "
            "only attention (the letter *) can be exported"
        )
    bare = [n for n, kinds in enumerate(layers) if kinds.mixer is None]
    if bare:
        reasons.append(
            f"model.pattern = {config.pattern!r}: {layer_list(bare)} no mixer; every layer needs attention and one "
            "feed-forward, such as '*-' or '*E'"
        )
    open_ended = [n for n, kinds in enumerate(layers) if kinds.feedforward is None]
    if open_ended:
        reasons.append(
            f"model.pattern = {config.pattern!r}: {layer_list(open_ended)} no feed-forward; every layer needs "
            "attention and one feed-forward, such as '*-' or '*E'"
        )
    return reasons


def attention_bias_reasons(config: ModelConfig) -> list[str]:
    """Return why the attention's biases are not all of q, k, v and output, or none."""
    present = [part for part in ATTENTION_BIASES if part in config.bias]
    if len(present) in (0, len(ATTENTION_BIASES)):
        return []
    fits = "; q, k, v alone would be Qwen2's, which is no target yet" if present == ["q", "k", "v"] else ""
    return [f"model.bias has {present} of attention: the class knows all of {list(ATTENTION_BIASES)} or none{fits}"]


def moe_reasons(config: ModelConfig) -> list[str]:
    """Return what no MoE class here can represent: shared experts and biases of experts."""
    reasons = []
    shared = experts_of(config).num_shared_experts
    if shared:
        reasons.append(
            f"model.moe.num_shared_experts = {shared}: neither Mixtral nor Qwen3Moe has shared experts, and Qwen2Moe "
            "puts a learned gate on its own; GraniteMoeShared (softmax) or Glm4Moe (sigmoid) would fit and are no "
            "targets yet; 0 can be exported"
        )
    if "ffn" in config.bias:
        reasons.append("model.bias has 'ffn': experts have no biases in any of these classes; leave 'ffn' out")
    return reasons


def experts_of(config: ModelConfig) -> MoeConfig:
    """Return the [model.moe] table of a model that has experts.

    Raises:
        ValueError: if there is none, which `ModelConfig.problems` finds first.
    """
    if config.moe is None:
        raise ValueError(f"model.pattern = {config.pattern!r} has an E, but there is no table [model.moe]")
    return config.moe


def attention_bias_parts(foreign: Mapping[str, Any]) -> list[str]:
    """Return our names of the biases that a foreign `attention_bias` stands for."""
    return list(ATTENTION_BIASES) if foreign.get("attention_bias", False) else []


def layer_list(numbers: Iterable[int]) -> str:
    """Return `layer 3 has`, or `layers 0, 2, 4 and 12 more have`, to begin a sentence."""
    listed = list(numbers)
    if len(listed) == 1:
        return f"layer {listed[0]} has"
    shown = ", ".join(str(number) for number in listed[:3])
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return f"layers {shown}{more} have"
