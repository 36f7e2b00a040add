"""`mamba`, MambaForCausalLM: Mamba-1 mixers alone; c = inner_size channels, R = dt_rank, N = state_size.

layers.N.mixer.part.x, z             backbone.layers.N.mixer.in_proj.weight   [2c, h]
layers.N.mixer.part.conv_x           ...conv1d.weight [c, 1, k], bias [c]
layers.N.mixer.part.dt_down, B, C    ...x_proj.weight     [R + 2N, c]
layers.N.mixer.part.dt_up, dt_bias   ...dt_proj.weight [c, R], bias [c]
layers.N.mixer.part.A_log, D         the same
layers.N.mixer.part.output           ...out_proj.weight   [h, c]
"""

from collections.abc import Iterator, Mapping
from typing import Any

from meshwright.model.config import ModelConfig
from meshwright.model.families.family import Family, Row, same
from meshwright.model.families.mamba2 import NAMES, NEEDED
from meshwright.model.families.rules import ANY, Parts, reasons
from meshwright.model.families.ssm import LOADED_WITH, conv_rows, joined_rows
from meshwright.model.families.table import linear_rows, size_keys, sizes_to_ours, stack_rows, with_defaults
from meshwright.model.kinds.mixers.mamba1 import Mamba1Config

PARTS = Parts(("mamba1",), (None,), "'m'")
RULES = {f"mamba1.{key}": ANY for key in Mamba1Config.model_fields}
FIXED = {"hidden_act": ("silu",)}


def reasons_against(config: ModelConfig) -> list[str]:
    """Return every reason why a Mamba cannot be this model."""
    found = reasons(config, PARTS, RULES)
    if config.mamba1 is not None and (c := config.mamba1.channels(config.hidden_size)) % config.hidden_size:
        found.append(
            f"model.mamba1.inner_size = {c}: the class knows only whole multiples of model.hidden_size ="
            f" {config.hidden_size}; {2 * config.hidden_size} can be exported"
        )
    return found


def mapping(config: ModelConfig) -> Iterator[Row]:
    """Yield all tensors of a Mamba."""
    return stack_rows(config, {"mamba1": mamba1_rows}, NAMES)


def mamba1_rows(config: ModelConfig, ours: str, theirs: str) -> Iterator[Row]:
    """Yield the rows of one Mamba-1 mixer, `mixer` in the layer `theirs`."""
    table, h, there = mamba1_of(config), config.hidden_size, f"{theirs}.mixer"
    c, rank, size = table.channels(h), table.rank(h), table.state_size
    yield from joined_rows(ours, f"{there}.in_proj", {"x": c, "z": c}, (h,), bias=table.bias)
    yield from conv_rows(ours, f"{there}.conv1d", {"conv_x": c}, table.conv_kernel, bias=table.conv_bias)
    yield from joined_rows(ours, f"{there}.x_proj", {"dt_down": rank, "B": size, "C": size}, (c,))
    yield same(f"{ours}.dt_up.weight", f"{there}.dt_proj.weight", (c, rank))
    yield same(f"{ours}.dt_bias", f"{there}.dt_proj.bias", (c,))
    yield same(f"{ours}.A_log", f"{there}.A_log", (c, size))
    yield same(f"{ours}.D", f"{there}.D", (c,))
    yield from linear_rows(f"{ours}.output", f"{there}.out_proj", (h, c), bias=table.bias)


def mamba1_of(config: ModelConfig) -> Mamba1Config:
    """Return the [model.mamba1] table of a model that has such mixers."""
    assert config.mamba1 is not None, "the checks see to it that m has its table"
    return config.mamba1


def to_foreign(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of a Mamba's config.json."""
    table, h = mamba1_of(config), config.hidden_size
    return size_keys(config) | {
        "layer_norm_epsilon": config.norm_eps,
        "state_size": table.state_size,
        "conv_kernel": table.conv_kernel,
        "expand": table.channels(h) // h,
        "intermediate_size": table.channels(h),
        "time_step_rank": table.rank(h),
        "use_bias": table.bias,
        "use_conv_bias": table.conv_bias,
        "residual_in_fp32": True,
    }


def to_ours(foreign: Mapping[str, Any]) -> dict[str, Any]:
    """Return our [model] keys from a Mamba's config.json."""
    rank = foreign.get("time_step_rank", "auto")
    inner = foreign.get("intermediate_size", foreign.get("expand", 2) * foreign["hidden_size"])
    return sizes_to_ours(with_defaults(foreign, initializer_range=0.1), tied=True) | {
        "pattern": "m",
        "norm_eps": float(foreign.get("layer_norm_epsilon", 1e-5)),
        "mamba1": {
            "inner_size": inner,
            "dt_rank": 0 if rank == "auto" else rank,
            "state_size": foreign.get("state_size", 16),
            "conv_kernel": foreign.get("conv_kernel", 4),
            "bias": foreign.get("use_bias", False),
            "conv_bias": foreign.get("use_conv_bias", True),
        },
    }


MAMBA = Family(
    "mamba", "MambaForCausalLM", reasons_against, mapping, to_foreign, to_ours, NEEDED, FIXED, loaded_with=LOADED_WITH
)
