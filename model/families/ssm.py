"""Rows and keys of Mamba-2, which Mamba2 and GraniteMoeHybrid share; n heads of width d, g groups, N = state_size.

ours                              theirs
z, x, B, C, dt                    in_proj.weight   [2*n*d + 2*g*N + n, h]   one behind the other
conv_x, conv_B, conv_C            conv1d.weight    [n*d + 2*g*N, 1, k]
A_log, D, dt_bias, norm           the same
output                            out_proj.weight  [h, n*d]
"""

from collections.abc import Iterator, Mapping
from typing import Any

from meshwright.model.config import ModelConfig
from meshwright.model.families.family import Row, Source, same
from meshwright.model.families.foreign_keys import shown
from meshwright.model.families.rules import ANY
from meshwright.model.families.table import linear_rows
from meshwright.model.kinds.mixers.mamba2 import Mamba2Config

RULES = {f"mamba2.{key}": ANY for key in Mamba2Config.model_fields}
NO_LIMIT = ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}])
"""What time_step_limit may hold."""

# Concerns first values alone, and yet transformers 5.23 divides what it has just loaded by sqrt(num_hidden_layers),
# each time anew: a model that it loads and saves again is another one.
LOADED_WITH = {"rescale_prenorm_residual": False}


def mamba2_rows(config: ModelConfig, ours: str, theirs: str) -> Iterator[Row]:
    """Yield the rows of one Mamba-2 mixer; `theirs` is its own name there."""
    table, h = mamba2_of(config), config.hidden_size
    n, shared = table.heads(h), table.num_groups * table.state_size
    c = n * table.head_dim
    columns = {"z": c, "x": c, "B": shared, "C": shared, "dt": n}
    yield from joined_rows(ours, f"{theirs}.in_proj", columns, (h,), bias=table.bias)
    convolved = {"conv_x": c, "conv_B": shared, "conv_C": shared}
    yield from conv_rows(ours, f"{theirs}.conv1d", convolved, table.conv_kernel, bias=table.conv_bias)
    for name in ("A_log", "D", "dt_bias"):
        yield same(f"{ours}.{name}", f"{theirs}.{name}", (n,))
    yield same(f"{ours}.norm.weight", f"{theirs}.norm.weight", (c,))
    yield from linear_rows(f"{ours}.output", f"{theirs}.out_proj", (h, c), bias=table.bias)


def joined_rows(
    ours: str, theirs: str, columns: dict[str, int], tail: tuple[int, ...], *, bias: bool = False, groups: int = 1
) -> Iterator[Row]:
    """Yield the weight, and the bias, of products that are one product there."""
    total = sum(columns.values())
    for kind, of in (("weight", tail), ("bias", ()))[: 1 + bias]:
        sources = tuple(Source(f"{ours}.{name}.{kind}", (rows, *of)) for name, rows in columns.items())
        yield Row(f"{theirs}.{kind}", (total, *of), sources, groups=groups)


def conv_rows(ours: str, theirs: str, channels: dict[str, int], kernel: int, *, bias: bool) -> Iterator[Row]:
    """Yield the weight [c, 1, k], and the bias, of convolutions that are one there."""
    for row in joined_rows(ours, theirs, channels, (kernel,), bias=bias):
        has_kernel = row.theirs.endswith(".weight")
        yield row._replace(shape=(row.shape[0], 1, kernel)) if has_kernel else row


def mamba2_of(config: ModelConfig) -> Mamba2Config:
    """Return the [model.mamba2] table of a model that has such mixers."""
    assert config.mamba2 is not None, "the checks see to it that M has its table"
    return config.mamba2


def check_no_limit(foreign: Mapping[str, Any]) -> None:
    """Check that nothing bounds the steps.

    Raises:
        ValueError: if something does, or may.
    """
    limit = foreign.get("time_step_limit", NO_LIMIT[0])
    if limit not in NO_LIMIT:
        raise ValueError(f"time_step_limit = {shown(limit)}: only steps without limits can be read, [0.0, Infinity]")


def width_problems(config: ModelConfig) -> list[str]:
    """Return why the heads together are no whole multiple of the stream, which the classes ask for."""
    if config.mamba2 is None:
        return []
    n, d, h = config.mamba2.heads(config.hidden_size), config.mamba2.head_dim, config.hidden_size
    if n * d % h == 0:
        return []
    return [
        f"model.mamba2.num_heads = {n}: times model.mamba2.head_dim = {d} is {n * d}, and the class knows only whole"
        f" multiples of model.hidden_size = {h}; {2 * h // d if 2 * h % d == 0 else h} heads would fit"
        + ("" if 2 * h % d == 0 else " with head_dim = 2")
    ]
