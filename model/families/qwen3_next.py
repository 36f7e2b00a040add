"""`qwen3_next`, Qwen3NextForCausalLM: gated delta nets and gated attention, experts with a gated shared one.

n value heads of width e, m key heads of width d, in m groups of one key head and n/m value heads:

    layers.N.mixer.part.q, k, v, z              ...linear_attn.in_proj_qkvz.weight   [2md + 2ne, h]   by groups
    layers.N.mixer.part.beta, a                 ...linear_attn.in_proj_ba.weight     [2n, h]          by groups
    layers.N.mixer.part.conv_q, conv_k, conv_v  ...linear_attn.conv1d.weight         [2md + ne, 1, l]
    layers.N.mixer.part.q, gate                 ...self_attn.q_proj.weight           by heads
    layers.N.feedforward.part.shared_gate       ...mlp.shared_expert_gate            [1, h]

All norms multiply by 1 + weight, but for that of the delta net's output. Layers that predict further tokens (mtp.*) are
left out.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from meshwright.model.config import ModelConfig
from meshwright.model.families.family import Family, Row, same
from meshwright.model.families.mixtral import expert_keys
from meshwright.model.families.qwen3_moe import dense_layer_keys, feedforward_letters
from meshwright.model.families.rules import ANY, ROPE, Parts, all_or_none, no_bias, only, reasons
from meshwright.model.families.ssm import conv_rows, joined_rows
from meshwright.model.families.table import (
    ATTENTION_BIASES,
    NEEDED,
    attention_bias_parts,
    balancing_to_ours,
    common_keys,
    common_keys_to_ours,
    expert_rows,
    experts_of,
    gated_rows,
    linear_rows,
    mlp_rows,
    shortest_pattern,
    stack_rows,
    with_defaults,
)
from meshwright.model.kinds.mixers.gated_delta import GatedDeltaConfig
from meshwright.model.kinds.unread import keys_read

PARTS = Parts(("attention", "gated_delta"), ("mlp", "moe"), "'3(GE)*E'")
RULES = {
    **ROPE,
    "rope_fraction": ANY,
    "norm": only("rmsnorm_zero_centred"),
    "qk_norm": only(True, why="Qwen3Next has norms of queries and keys"),
    "attention_gate": only(True, why="Qwen3Next has a gate behind attention"),
    "gated_delta": ANY,
    "moe.normalise_top_k": ANY,
    "moe.num_shared_experts": ANY,
    "moe.shared_expert_gate": only(True, why="Qwen3Next has a gate of its shared expert"),
}
FIXED = {"hidden_act": ("silu",), "attention_dropout": (0.0,)}
LETTERS = {"linear_attention": "G", "full_attention": "*"}


def reasons_against(config: ModelConfig) -> list[str]:
    """Return every reason why a Qwen3Next cannot be this model."""
    found = reasons(config, PARTS, RULES) + all_or_none(config, ATTENTION_BIASES)
    if config.moe is not None and config.moe.num_shared_experts == 0:
        found.append("model.moe.num_shared_experts = 0: a Qwen3Next always has some; 1 can be exported")
    return found + no_bias(config, ["ffn"], "Qwen3Next's feed-forwards have")


def mapping(config: ModelConfig) -> Iterator[Row]:
    """Yield all tensors of a Qwen3Next."""
    parts = {"attention": gated_attention_rows, "gated_delta": delta_rows, "mlp": mlp_rows, "moe": _moe_rows}
    return stack_rows(config, parts)


def gated_attention_rows(config: ModelConfig, ours: str, theirs: str) -> Iterator[Row]:
    """Yield the rows of attention whose gate lies beside each head's queries."""
    h, d, there = config.hidden_size, config.head_dim, f"{theirs}.self_attn"
    q, kv = config.num_heads * d, config.num_kv_heads * d
    has_bias = "q" in config.bias
    columns = {"q": q, "gate": q}
    yield from joined_rows(ours, f"{there}.q_proj", columns, (h,), bias=has_bias, groups=config.num_heads)
    for name in ("k", "v"):
        yield from linear_rows(f"{ours}.{name}", f"{there}.{name}_proj", (kv, h), bias=has_bias)
    yield from linear_rows(f"{ours}.output", f"{there}.o_proj", (h, q), bias=has_bias)
    for name in ("q_norm", "k_norm"):
        yield same(f"{ours}.{name}.weight", f"{there}.{name}.weight", (d,))


def delta_rows(config: ModelConfig, ours: str, theirs: str) -> Iterator[Row]:
    """Yield the rows of one gated delta net, `linear_attn` in the layer `theirs`."""
    table, h, there = delta_of(config), config.hidden_size, f"{theirs}.linear_attn"
    n, m = table.heads(h), table.key_heads(h)
    keys, values = m * table.key_head_dim, n * table.value_head_dim
    columns = {"q": keys, "k": keys, "v": values, "z": values}
    yield from joined_rows(ours, f"{there}.in_proj_qkvz", columns, (h,), groups=m)
    yield from joined_rows(ours, f"{there}.in_proj_ba", {"beta": n, "a": n}, (h,), groups=m)
    convolved = {"conv_q": keys, "conv_k": keys, "conv_v": values}
    yield from conv_rows(ours, f"{there}.conv1d", convolved, table.conv_kernel, bias=False)
    for name in ("A_log", "dt_bias"):
        yield same(f"{ours}.{name}", f"{there}.{name}", (n,))
    yield same(f"{ours}.norm.weight", f"{there}.norm.weight", (table.value_head_dim,))
    yield same(f"{ours}.output.weight", f"{there}.out_proj.weight", (h, values))


def _moe_rows(config: ModelConfig, ours: str, theirs: str) -> Iterator[Row]:
    yield from expert_rows(config, ours, theirs)
    width = experts_of(config).shared_hidden_size
    yield from gated_rows(config, f"{ours}.shared", f"{theirs}.mlp.shared_expert", width)
    yield same(f"{ours}.shared_gate.weight", f"{theirs}.mlp.shared_expert_gate.weight", (1, config.hidden_size))


def delta_of(config: ModelConfig) -> GatedDeltaConfig:
    """Return the [model.gated_delta] table of a model that has such mixers, or its usual values."""
    return config.gated_delta or GatedDeltaConfig()


def to_foreign(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of a Qwen3Next's config.json."""
    table, h = delta_of(config), config.hidden_size
    names = {"attention": "full_attention", "gated_delta": "linear_attention"}
    keys = common_keys(config) | dense_layer_keys(config) | _feedforward_keys(config)
    # The class turns a quarter of a head where nothing is said.
    keys["rope_parameters"] = keys["rope_parameters"] | {"partial_rotary_factor": config.rope_fraction}
    if not config.num_heads:  # the class asks for heads even where no layer has any
        keys |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": h}
    return keys | {
        "partial_rotary_factor": config.rope_fraction,
        "intermediate_size": config.ffn_hidden_size,
        "attention_bias": "q" in config.bias,
        "layer_types": [names[str(kinds.mixer)] for kinds in config.layers],
        "linear_num_value_heads": table.heads(h),
        "linear_num_key_heads": table.key_heads(h),
        "linear_key_head_dim": table.key_head_dim,
        "linear_value_head_dim": table.value_head_dim,
        "linear_conv_kernel_dim": table.conv_kernel,
    }


def _feedforward_keys(config: ModelConfig) -> dict[str, Any]:
    if config.moe is None:
        return {}
    return expert_keys(config, "moe_intermediate_size") | {
        "shared_expert_intermediate_size": config.moe.shared_hidden_size,
        "norm_topk_prob": config.moe.normalise_top_k,
    }


def to_ours(foreign: Mapping[str, Any]) -> dict[str, Any]:
    """Return our [model] keys from a Qwen3Next's config.json."""
    mixers, feedforwards = _mixer_letters(foreign), feedforward_letters(foreign)
    # Qwen3NextConfig's head_dim is 256 where a file does not name one.
    common = common_keys_to_ours(
        with_defaults(foreign, head_dim=256, num_key_value_heads=2),
        default_rope_base=10_000.0,
        default_rope_fraction=0.25,
    )
    pattern = shortest_pattern([a + b for a, b in zip(mixers, feedforwards, strict=True)])
    keys = common | {
        "pattern": pattern,
        "ffn_hidden_size": foreign["intermediate_size"],
        "norm": "rmsnorm_zero_centred",
        "qk_norm": True,
        "attention_gate": True,
        "bias": attention_bias_parts(foreign),
        **({"moe": _experts(foreign)} if "E" in feedforwards else {}),
        **({"gated_delta": _delta(foreign)} if "G" in mixers else {}),
    }
    return keys_read(pattern, keys)


def _mixer_letters(foreign: Mapping[str, Any]) -> list[str]:
    count, every = foreign["num_hidden_layers"], foreign.get("full_attention_interval", 4)
    usual = ["full_attention" if (n + 1) % every == 0 else "linear_attention" for n in range(count)]
    layers = foreign.get("layer_types") or usual
    strange = sorted(set(layers) - LETTERS.keys())
    if strange or len(layers) != count:
        what = f"has {strange}" if strange else f"has {len(layers)} entries"
        raise ValueError(f"layer_types: {what}; must be {count} of {', '.join(LETTERS)}")
    return [LETTERS[name] for name in layers]


def _experts(foreign: Mapping[str, Any]) -> dict[str, Any]:
    width, shared = foreign["moe_intermediate_size"], foreign.get("shared_expert_intermediate_size", 512)
    if shared % width:
        raise ValueError(
            f"shared_expert_intermediate_size = {shared}: only multiples of moe_intermediate_size = {width} can be read"
        )
    return {
        "num_experts": foreign.get("num_experts", 512),
        "top_k": foreign.get("num_experts_per_tok", 10),
        "expert_hidden_size": width,
        "num_shared_experts": shared // width,
        "shared_expert_gate": True,
        "normalise_top_k": foreign.get("norm_topk_prob", True),
        "load_balancing_weight": balancing_to_ours(foreign, 0.001),
    }


def _delta(foreign: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_heads": foreign.get("linear_num_value_heads", 32),
        "num_key_heads": foreign.get("linear_num_key_heads", 16),
        "key_head_dim": foreign.get("linear_key_head_dim", 128),
        "value_head_dim": foreign.get("linear_value_head_dim", 128),
        "conv_kernel": foreign.get("linear_conv_kernel_dim", 4),
    }


QWEN3_NEXT = Family(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    reasons_against,
    mapping,
    to_foreign,
    to_ours,
    (*NEEDED, "moe_intermediate_size"),
    FIXED,
    aliases={"num_local_experts": "num_experts"},  # as our own files have both
    not_null=("head_dim", "num_key_value_heads", "router_aux_loss_coef"),
    ignored=r"^mtp\.",
)
