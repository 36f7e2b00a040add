"""Initial weights: each element a function of (seed, global name, global element index), filled where it is held.

A model is built on the meta device; after it was split and wrapped, each rank fills only the elements that it
holds, in pieces of a million. So the weights are bitwise the same in every layout, and no rank ever holds more
than its part. Values are computed in fp64, rounded to fp32 and then to the parameter's type: a bf16 weight and
its fp32 master weight come from the same number.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import log, prod
from typing import Literal, get_args

import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn

from meshwright.kernels.limits import USUAL
from meshwright.parallel.counter_rng import normal_from_uniform, uniform_at, uniform_range
from meshwright.parallel.fits import check_finite, check_known, check_sizes

Distribution = Literal["normal", "xavier_uniform", "xavier_normal", "scaled"]


@dataclass(frozen=True)
class InitRule:
    """How the elements of one parameter are distributed.

    `scale` is the standard deviation of `normal`, the bound of `uniform` (from -scale to scale), the value of
    `constant`, the step of `column` (scale * its index in the last dim). From `low` to `high`: `between`, evenly;
    `log_of_uniform`, the logarithm of such a number; `softplus_inverse`, what softplus turns into a number whose
    logarithm is even (the first time steps of state-space models). `log_of_column`: log(1 + the index in the last dim).
    """

    kind: Literal[
        "normal",
        "uniform",
        "constant",
        "between",
        "log_of_uniform",
        "softplus_inverse",
        "column",
        "log_of_column",
    ]
    scale: float = 0.0
    low: float = 0.0
    high: float = 0.0

    @property
    def is_by_column(self) -> bool:
        """Say whether an element depends on its index in the last dim alone, and nothing is drawn."""
        return self.kind in ("column", "log_of_column")

    def sample(self, uniform: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
        """Turn numbers in (0, 1) into elements."""
        if self.kind == "normal":
            return normal_from_uniform(uniform) * self.scale
        if self.kind == "uniform":
            return (2.0 * uniform - 1.0) * self.scale
        if self.kind == "softplus_inverse":
            step = (log(self.low) + uniform * (log(self.high) - log(self.low))).exp()
            return step + (-torch.expm1(-step)).log()
        between = self.low + uniform * (self.high - self.low)
        return between.log() if self.kind == "log_of_uniform" else between

    def of_column(self, column: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
        """Return the elements at these indices of the last dim."""
        return (1.0 + column).log() if self.kind == "log_of_column" else self.scale * column


ZEROS = InitRule("constant", 0.0)
ONES = InitRule("constant", 1.0)


@dataclass(frozen=True)
class InitPolicy:
    """Which rule a matrix gets, from the global sizes: the choice that a run file makes for all layers.

    `normal`: N(0, std). `xavier_uniform`: U(-a, a) with a = sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010).
    `xavier_normal`: N(0, 2 / (fan_in + fan_out)), the same variance. `scaled`: N(0, 1 / fan_in). `residual_depth` > 0
    divides what is written to the residual stream by sqrt(residual_depth), the number of branches that are added up
    (GPT-2, section 2.3). `value_gain` multiplies what goes through a part as a value: attention's values,
    feed-forwards, and all outputs (DeepNorm's beta).
    """

    kind: Distribution = "normal"
    std: float = 0.02
    residual_depth: int = 0
    value_gain: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a kind that is none, and numbers of which no weights can be made.

        Raises:
            ValueError: naming what it is not.
        """
        check_known("kind", [self.kind], get_args(Distribution))
        check_finite({"std": self.std}, usual=0.02, least=0.0)
        check_finite({"value_gain": self.value_gain}, usual=1.0)
        check_sizes({"residual_depth": self.residual_depth}, may_be_none=("residual_depth",))

    def matrix(self, fan_in: int, fan_out: int, *, to_residual: bool = False, is_value: bool = False) -> InitRule:
        """Return the rule of a weight [fan_out, fan_in]; `is_value`: of values or in a feed-forward."""
        shrink = self.residual_depth**-0.5 if to_residual and self.residual_depth else 1.0
        if is_value or to_residual:
            shrink *= self.value_gain
        if self.kind == "xavier_uniform":
            return InitRule("uniform", (6.0 / (fan_in + fan_out)) ** 0.5 * shrink)
        if self.kind == "xavier_normal":
            return InitRule("normal", (2.0 / (fan_in + fan_out)) ** 0.5 * shrink)
        if self.kind == "scaled":
            return InitRule("normal", fan_in**-0.5 * shrink)
        return InitRule("normal", self.std * shrink)

    def embedding(self, vocab_size: int, hidden_size: int) -> InitRule:
        """Return the rule of an embedding: a row is looked up, so its fan-in is the width (Xavier: both)."""
        if self.kind in ("xavier_uniform", "xavier_normal"):
            return self.matrix(vocab_size, hidden_size)
        return self.matrix(hidden_size, vocab_size)


def init_rules(model: nn.Module) -> dict[str, InitRule]:
    """Return every parameter's rule by its global name, as the modules say in `init_rules()`.

    Raises:
        ValueError: if a parameter has no rule.
    """
    rules: dict[str, InitRule] = {}
    for prefix, module in model.named_modules():
        say = getattr(module, "init_rules", None)
        if callable(say):
            rules |= {f"{prefix}.{name}" if prefix else name: rule for name, rule in say().items()}
    missing = [name for name, _ in model.named_parameters() if name not in rules]
    if missing:
        raise ValueError(f"no initialisation rule for {', '.join(missing)}")
    return rules


def fill(
    held: Tensor,
    rule: InitRule,
    *,
    seed: int,
    name: str,
    global_shape: tuple[int, ...],
    offset: tuple[int, ...],
    at_once: int = USUAL.initial_weights,
) -> None:
    """Fill a held part, which begins at `offset` of the global tensor, with the global tensor's elements."""
    with torch.no_grad():
        if rule.kind == "constant":
            held.fill_(rule.scale)
            return
        if held.numel() == 0:
            return
        flat = held.view(-1)
        for begin in range(0, flat.numel(), at_once):
            end = min(begin + at_once, flat.numel())
            if rule.is_by_column:
                index = _global_index(torch.arange(begin, end), tuple(held.shape), global_shape, offset)
                values = rule.of_column((index % global_shape[-1]).double())
            else:
                uniform = _uniform_of_piece(seed, name, begin, end, tuple(held.shape), global_shape, offset)
                values = rule.sample(uniform)
            flat[begin:end].copy_(values if held.dtype == torch.float64 else values.to(torch.float32))


def _uniform_of_piece(
    seed: int,
    name: str,
    begin: int,
    end: int,
    shape: tuple[int, ...],
    global_shape: tuple[int, ...],
    offset: tuple[int, ...],
) -> Float64[Tensor, " n"]:
    if shape[1:] == global_shape[1:]:
        # Whole rows: one unbroken stretch of the global tensor.
        start = (offset[0] if offset else 0) * prod(global_shape[1:])
        return uniform_range(seed, name, start + begin, start + end)
    return uniform_at(seed, name, _global_index(torch.arange(begin, end), shape, global_shape, offset))


def _global_index(
    local_index: Int64[Tensor, " n"], shape: tuple[int, ...], global_shape: tuple[int, ...], offset: tuple[int, ...]
) -> Int64[Tensor, " n"]:
    """Return each element's index in the flattened global tensor."""
    index = torch.zeros_like(local_index)
    rest = local_index
    for dim, stride in reversed(list(enumerate(_strides(global_shape)))):
        index = index + (rest % shape[dim] + offset[dim]) * stride
        rest = rest // shape[dim]
    return index


def _strides(shape: tuple[int, ...]) -> Iterator[int]:
    for dim in range(len(shape)):
        yield prod(shape[dim + 1 :])
