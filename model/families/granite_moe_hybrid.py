"""`granitemoehybrid`, GraniteMoeHybridForCausalLM: Mamba-2 and attention, with experts and a shared MLP (Granite 4).

layers.N.mixer.part.*                        model.layers.N.mamba.* (ssm.py) or .self_attn.*
layers.N.feedforward.part.router.weight      ...block_sparse_moe.router.layer.weight    [e, h]
layers.N.feedforward.part.experts.gate, up   ...block_sparse_moe.input_linear.weight    [e, 2f, h]   gate, up of each
layers.N.feedforward.part.experts.down       ...block_sparse_moe.output_linear.weight   [e, h, f]
layers.N.feedforward.part.shared.gate, up    ...shared_mlp.input_linear.weight          [2s, h]
layers.N.feedforward.part.shared.down        ...shared_mlp.output_linear.weight         [h, s]
layers.N.feedforward.part.gate, up           the same, where no layer has experts

This is the family that most inference engines load. Its attention knows positions by RoPE or not at all.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from meshwright.model.config import ModelConfig
from meshwright.model.families import ssm
from meshwright.model.families.family import Family, Row, Source, same
from meshwright.model.families.rules import ANY, ROPE, Parts, all_or_none, head_reasons, no_bias, only, reasons
from meshwright.model.families.table import (
    ATTENTION_BIASES,
    NEEDED,
    attention_bias_parts,
    attention_rows,
    balancing_to_ours,
    common_keys,
    common_keys_to_ours,
    experts_of,
    shortest_pattern,
    stack_rows,
    without,
)
from meshwright.model.kinds.unread import keys_read

PARTS = Parts(("attention", "mamba2"), ("mlp", "moe"), "'ME', '*E' or 'M-*-'")
RULES = {
    **ROPE,
    **ssm.RULES,
    "position": only("rope", "none"),
    "attention_scale": ANY,
    "embedding_multiplier": ANY,
    "residual_multiplier": ANY,
    "logits_scaling": ANY,
    "moe.num_shared_experts": ANY,
}
FIXED = {"hidden_act": ("silu",), "attention_dropout": (0.0,), "normalization_function": ("rmsnorm",)}
NAMES_OF_LAYERS = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*"}


def reasons_against(config: ModelConfig) -> list[str]:
    """Return every reason why a GraniteMoeHybrid cannot be this model."""
    found = reasons(config, PARTS, RULES) + all_or_none(config, ATTENTION_BIASES) + ssm.width_problems(config)
    if len({kinds.feedforward for kinds in config.layers}) > 1:
        found.append(
            f"model.pattern = {config.pattern!r}: some layers have experts; either all or none of a GraniteMoeHybrid do"
        )
    if config.moe is not None and config.moe.num_shared_experts == 0:
        found.append("model.moe.num_shared_experts = 0: a GraniteMoeHybrid always has some; 1 can be exported")
    found += head_reasons(config, "GraniteMoeHybrid")
    return found + no_bias(config, ["ffn"], "Granite's feed-forwards have")


def mapping(config: ModelConfig) -> Iterator[Row]:
    """Yield all tensors of a GraniteMoeHybrid."""

    def mamba2_rows(config: ModelConfig, ours: str, theirs: str) -> Iterator[Row]:
        return ssm.mamba2_rows(config, ours, f"{theirs}.mamba")

    def mlp_rows(config: ModelConfig, ours: str, theirs: str) -> Iterator[Row]:
        return _fused_rows(config, ours, theirs, config.ffn_hidden_size)

    parts = {"attention": attention_rows, "mamba2": mamba2_rows, "mlp": mlp_rows, "moe": _moe_rows}
    return stack_rows(config, parts)


def _fused_rows(config: ModelConfig, ours: str, theirs: str, width: int) -> Iterator[Row]:
    h, f, there = config.hidden_size, width, f"{theirs}.shared_mlp"
    yield from ssm.joined_rows(ours, f"{there}.input_linear", {"gate": f, "up": f}, (h,))
    yield same(f"{ours}.down.weight", f"{there}.output_linear.weight", (h, f))


def _moe_rows(config: ModelConfig, ours: str, theirs: str) -> Iterator[Row]:
    moe, h, there = experts_of(config), config.hidden_size, f"{theirs}.block_sparse_moe"
    e, f = moe.num_experts, moe.expert_hidden_size
    yield same(f"{ours}.router.weight", f"{there}.router.layer.weight", (e, h))
    inward = (Source(f"{ours}.experts.gate", (e, f, h)), Source(f"{ours}.experts.up", (e, f, h)))
    yield Row(f"{there}.input_linear.weight", (e, 2 * f, h), inward, groups=e)
    yield same(f"{ours}.experts.down", f"{there}.output_linear.weight", (e, h, f))
    yield from _fused_rows(config, f"{ours}.shared", theirs, moe.shared_hidden_size)


def to_foreign(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of a GraniteMoeHybrid's config.json."""
    return common_keys(config) | _attention_keys(config) | _feedforward_keys(config) | _mamba_keys(config)


def _attention_keys(config: ModelConfig) -> dict[str, Any]:
    names = {"attention": "attention", "mamba2": "mamba"}
    heads, head_dim = config.num_heads or 1, config.head_dim or config.hidden_size
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": config.num_kv_heads or 1,
        "head_dim": head_dim,
        "layer_types": [names[str(kinds.mixer)] for kinds in config.layers],
        "position_embedding_type": "rope" if config.position == "rope" else None,
        "attention_bias": "q" in config.bias,
        "attention_multiplier": config.attention_scale or head_dim**-0.5,
        "embedding_multiplier": config.embedding_multiplier,
        "residual_multiplier": config.residual_multiplier,
        "logits_scaling": config.logits_scaling,
    }


def _feedforward_keys(config: ModelConfig) -> dict[str, Any]:
    if config.moe is None:
        width = config.ffn_hidden_size
        # Both widths are the same: llama.cpp takes the first where there are no experts.
        return {"num_local_experts": 0, "num_experts_per_tok": 0, "intermediate_size": width} | {
            "shared_intermediate_size": width
        }
    return {
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
        "intermediate_size": config.moe.expert_hidden_size,
        "shared_intermediate_size": config.moe.shared_hidden_size,
        "output_router_logits": False,
        "router_aux_loss_coef": config.moe.load_balancing_weight,
    }


def _mamba_keys(config: ModelConfig) -> dict[str, Any]:
    table, h = config.mamba2, config.hidden_size
    if table is None:  # the class checks them also where no layer has them
        return {"mamba_n_heads": 2, "mamba_d_head": h, "mamba_expand": 2}
    n = table.heads(h)
    return {
        "mamba_n_heads": n,
        "mamba_d_head": table.head_dim,
        "mamba_n_groups": table.num_groups,
        "mamba_d_state": table.state_size,
        "mamba_d_conv": table.conv_kernel,
        "mamba_expand": n * table.head_dim // h,
        "mamba_chunk_size": table.chunk_size,
        "mamba_conv_bias": table.conv_bias,
        "mamba_proj_bias": table.bias,
    }


def to_ours(foreign: Mapping[str, Any]) -> dict[str, Any]:
    """Return our [model] keys from a GraniteMoeHybrid's config.json."""
    ssm.check_no_limit(foreign)
    letters = _mixer_letters(foreign)
    experts = foreign.get("num_local_experts", 8)
    shared = foreign.get("shared_intermediate_size", 1024)
    place = foreign.get("position_embedding_type")
    if place not in (None, "rope", "nope"):
        raise ValueError(f"position_embedding_type = {place!r}: only 'rope' or null can be read")
    pattern = shortest_pattern([letter + ("E" if experts else "-") for letter in letters])
    keys = common_keys_to_ours(without(foreign, "head_dim"), default_rope_base=10_000.0) | {
        "pattern": pattern,
        "ffn_hidden_size": foreign["intermediate_size"] if experts else shared,
        "position": "rope" if place == "rope" else "none",
        "attention_scale": float(foreign.get("attention_multiplier", 1.0)),
        "embedding_multiplier": float(foreign.get("embedding_multiplier", 1.0)),
        "residual_multiplier": float(foreign.get("residual_multiplier", 1.0)),
        "logits_scaling": float(foreign.get("logits_scaling", 1.0)),
        "bias": attention_bias_parts(foreign),
        **({"moe": _experts(foreign, shared)} if experts else {}),
        **({"mamba2": _mamba(foreign)} if "M" in letters else {}),
    }
    # The class names heads, positions and the rest of attention even where no layer has any.
    return keys_read(pattern, keys)


def _mixer_letters(foreign: Mapping[str, Any]) -> list[str]:
    layers = foreign.get("layer_types") or ["mamba"] * foreign["num_hidden_layers"]
    strange = sorted(set(layers) - NAMES_OF_LAYERS.keys())
    if strange or len(layers) != foreign["num_hidden_layers"]:
        rule = f"must be {foreign['num_hidden_layers']} of {', '.join(NAMES_OF_LAYERS)}"
        raise ValueError(f"layer_types: {f'has {strange}' if strange else f'has {len(layers)} entries'}; {rule}")
    return [NAMES_OF_LAYERS[name] for name in layers]


def _experts(foreign: Mapping[str, Any], shared: int) -> dict[str, Any]:
    width = foreign["intermediate_size"]
    if shared % width:
        raise ValueError(
            f"shared_intermediate_size = {shared}: only multiples of intermediate_size = {width} can be read"
        )
    return {
        "num_experts": foreign.get("num_local_experts", 8),
        "top_k": foreign.get("num_experts_per_tok", 2),
        "expert_hidden_size": width,
        "num_shared_experts": shared // width,
        "load_balancing_weight": balancing_to_ours(foreign, 0.001),
    }


def _mamba(foreign: Mapping[str, Any]) -> dict[str, Any]:
    heads, width = foreign.get("mamba_n_heads", 128), foreign.get("mamba_d_head", "auto")
    inner = foreign.get("mamba_expand", 2) * foreign["hidden_size"]
    return {
        "num_heads": heads,
        "head_dim": max(1, inner // heads) if width == "auto" else width,
        "num_groups": foreign.get("mamba_n_groups", 1),
        "state_size": foreign.get("mamba_d_state", 256),
        "conv_kernel": foreign.get("mamba_d_conv", 4),
        "bias": foreign.get("mamba_proj_bias", False),
        "conv_bias": foreign.get("mamba_conv_bias", True),
    }


GRANITE_MOE_HYBRID = Family(
    "granitemoehybrid",
    "GraniteMoeHybridForCausalLM",
    reasons_against,
    mapping,
    to_foreign,
    to_ours,
    NEEDED,
    FIXED,
    aliases={"layers_block_type": "layer_types"},
    not_null=("head_dim",),
)
