"""`mamba2`, Mamba2ForCausalLM: Mamba-2 mixers alone, without feed-forwards.

layers.N.mixer.norm.weight    backbone.layers.N.norm.weight     [h]
layers.N.mixer.part.*         backbone.layers.N.mixer.*         ssm.py
"""

from collections.abc import Iterator, Mapping
from typing import Any

from meshwright.model.config import ModelConfig
from meshwright.model.families.family import Family, Row
from meshwright.model.families.rules import Parts, reasons
from meshwright.model.families.ssm import LOADED_WITH, RULES, check_no_limit, mamba2_of, mamba2_rows, width_problems
from meshwright.model.families.table import Names, size_keys, sizes_to_ours, stack_rows, with_defaults

NAMES = Names("backbone.embeddings", "backbone.layers", {"mixer": "norm"}, final="backbone.norm_f")
PARTS = Parts(("mamba2",), (None,), "'M'")
FIXED = {"hidden_act": ("silu",)}
NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers")


def reasons_against(config: ModelConfig) -> list[str]:
    """Return every reason why a Mamba2 cannot be this model."""
    return reasons(config, PARTS, RULES) + width_problems(config)


def mapping(config: ModelConfig) -> Iterator[Row]:
    """Yield all tensors of a Mamba2."""

    def rows(config: ModelConfig, ours: str, theirs: str) -> Iterator[Row]:
        return mamba2_rows(config, ours, f"{theirs}.mixer")

    return stack_rows(config, {"mamba2": rows}, NAMES)


def to_foreign(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of a Mamba2's config.json."""
    table = mamba2_of(config)
    n = table.heads(config.hidden_size)
    return size_keys(config) | {
        "layer_norm_epsilon": config.norm_eps,
        "num_heads": n,
        "head_dim": table.head_dim,
        "n_groups": table.num_groups,
        "state_size": table.state_size,
        "conv_kernel": table.conv_kernel,
        "expand": n * table.head_dim // config.hidden_size,
        "intermediate_size": n * table.head_dim,  # MLX asks for it
        "chunk_size": table.chunk_size,
        "use_bias": table.bias,
        "use_conv_bias": table.conv_bias,
        "time_step_min": table.time_step_low,
        "time_step_max": table.time_step_high,
        "residual_in_fp32": True,
    }


def to_ours(foreign: Mapping[str, Any]) -> dict[str, Any]:
    """Return our [model] keys from a Mamba2's config.json."""
    check_no_limit(foreign)
    n, d, h = foreign.get("num_heads", 128), foreign.get("head_dim", 64), foreign["hidden_size"]
    expand = foreign.get("expand")
    if expand is not None and expand * h != n * d:
        raise ValueError(f"expand = {expand}: times hidden_size = {h} must be num_heads * head_dim = {n * d}")
    return sizes_to_ours(with_defaults(foreign, initializer_range=0.1)) | {
        "pattern": "M",
        "norm_eps": float(foreign.get("layer_norm_epsilon", 1e-5)),
        "mamba2": {
            "num_heads": n,
            "head_dim": d,
            "num_groups": foreign.get("n_groups", 8),
            "state_size": foreign.get("state_size", 128),
            "conv_kernel": foreign.get("conv_kernel", 4),
            "bias": foreign.get("use_bias", False),
            "conv_bias": foreign.get("use_conv_bias", True),
        },
    }


MAMBA2 = Family(
    "mamba2",
    "Mamba2ForCausalLM",
    reasons_against,
    mapping,
    to_foreign,
    to_ours,
    NEEDED,
    FIXED,
    not_null=("head_dim",),
    loaded_with=LOADED_WITH,
)
