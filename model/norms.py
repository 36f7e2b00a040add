"""The norms of a stack, and of heads: one class each; the table by name is at the end (kinds/norms.py describes them).

Each normalises the last dim, token by token, so that only their weights know of layouts: whole on every rank, and under
sequence parallelism with a gradient that is the sum of the ranks'.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from meshwright.kernels.norms import dynamic_tanh, layer_norm, rms_norm
from meshwright.kernels.precision import at_least_fp32
from meshwright.parallel.fits import check_finite
from meshwright.parallel.initialise import ONES, ZEROS, InitRule
from meshwright.parallel.mesh import NO_TP, Axis
from meshwright.parallel.placement import Placement, partial_over


class Norm(nn.Module):
    """What all norms share: weights that are whole, begin at a constant, and see this rank's tokens or heads only."""

    rules: dict[str, InitRule]

    def __init__(self, size: int, eps: float, *, tp: Axis = NO_TP, **rules: InitRule) -> None:
        """Hold a vector for each rule.

        Raises:
            ValueError: if no row could be divided with this `eps`.
        """
        super().__init__()
        check_finite({"eps": eps}, usual=1e-5, least=0.0)
        self.eps, self.tp, self.rules = eps, tp, rules
        for name in rules:
            self.register_parameter(name, nn.Parameter(torch.empty(1 if name == "alpha" else size)))

    def placements(self) -> dict[str, Placement]:
        """Say that the weights are whole, and their gradients the sum of the ranks'."""
        return dict.fromkeys(self.rules, Placement(grad_sum=partial_over(self.tp)))

    def init_rules(self) -> dict[str, InitRule]:
        """Say how each parameter begins."""
        return self.rules


class RMSNorm(Norm):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019)."""

    weight: Tensor

    def __init__(self, size: int, eps: float, *, tp: Axis = NO_TP) -> None:
        """Normalise the last dim, of the given size; each rank of `tp` sees other tokens, or other heads."""
        super().__init__(size, eps, tp=tp, weight=ONES)

    def forward(self, x: Float[Tensor, "*tokens h"]) -> Float[Tensor, "*tokens h"]:
        """Normalise each row; the result has x's type."""
        return rms_norm(x, self.weight, self.eps)


class ZeroCentredRMSNorm(Norm):
    """x / sqrt(mean(x^2) + eps) * (1 + weight), so that decay draws the scale to 1 (Gemma, Qwen3-Next)."""

    weight: Tensor

    def __init__(self, size: int, eps: float, *, tp: Axis = NO_TP) -> None:
        """Normalise the last dim, of the given size; each rank of `tp` sees other tokens, or other heads."""
        super().__init__(size, eps, tp=tp, weight=ZEROS)

    def forward(self, x: Float[Tensor, "*tokens h"]) -> Float[Tensor, "*tokens h"]:
        """Normalise each row; the result has x's type."""
        return rms_norm(x, at_least_fp32(self.weight) + 1.0, self.eps)


class LayerNorm(Norm):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias (Ba et al. 2016)."""

    weight: Tensor
    bias: Tensor

    def __init__(self, size: int, eps: float, *, tp: Axis = NO_TP) -> None:
        """Normalise the last dim, of the given size; each rank of `tp` sees other tokens."""
        super().__init__(size, eps, tp=tp, weight=ONES, bias=ZEROS)

    def forward(self, x: Float[Tensor, "*tokens h"]) -> Float[Tensor, "*tokens h"]:
        """Normalise each row; the result has x's type."""
        return layer_norm(x, self.weight, self.bias, self.eps)


def refuse_conditioned(norms: Mapping[str, object], user: str) -> None:
    """Refuse norms that ask for a condition where there is none to give.

    Raises:
        ValueError: naming each of them.
    """
    asking = {key: type(norm).__name__ for key, norm in norms.items() if getattr(norm, "needs_condition", False)}
    if asking:
        raise ValueError(
            "\n".join(
                f"{key} = {name}: must be without a condition, as {user} has none to give it; condition_size = 0, or a"
                " call of the norm by yourself, would fit"
                for key, name in asking.items()
            )
        )


class DynamicTanh(Norm):
    """tanh(alpha x) * weight + bias: no statistics at all (Zhu et al. 2025, equation 2)."""

    alpha: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, size: int, eps: float = 0.0, *, alpha: float = 0.5, tp: Axis = NO_TP) -> None:
        """Squash the last dim, of the given size; `alpha` is where that begins, `eps` is not used."""
        super().__init__(size, eps, tp=tp, alpha=InitRule("constant", alpha), weight=ONES, bias=ZEROS)

    def forward(self, x: Float[Tensor, "*tokens h"]) -> Float[Tensor, "*tokens h"]:
        """Squash each number; the result has x's type."""
        return dynamic_tanh(x, self.alpha, self.weight, self.bias)


class AdaptiveNorm(Norm):
    """A norm without weights of its own, scaled and shifted (Peebles and Xie 2023, adaLN).

    Without a condition the scale is learned, 1 + scale. With one, scale and shift are linear in it and begin at zero.
    """

    scale: Tensor

    def __init__(
        self, size: int, eps: float, *, centred: bool = False, condition_size: int = 0, tp: Axis = NO_TP
    ) -> None:
        """Normalise the last dim, of the given size, as RMSNorm or, `centred`, as LayerNorm."""
        super().__init__(size, eps, tp=tp, **({} if condition_size else {"scale": ZEROS}))
        self.centred = centred
        self.condition = _ScaleAndShift(condition_size, size, tp) if condition_size else None

    @property
    def needs_condition(self) -> bool:
        """Say whether it is to be given a condition, which a block and a model have none of."""
        return self.condition is not None

    def forward(
        self, x: Float[Tensor, "*tokens h"], condition: Float[Tensor, "*some c"] | None = None
    ) -> Float[Tensor, "*tokens h"]:
        """Normalise each row, and scale it; a condition [..., c] goes with all rows that it broadcasts to.

        Raises:
            ValueError: if a condition is missing, or given to a norm that has none.
        """
        if (condition is None) != (self.condition is None):
            has = "none" if self.condition is None else "one"
            raise ValueError(f"condition = {condition}: this norm was made for {has} (condition_size)")
        if self.condition is None:
            return self._scaled(x, at_least_fp32(self.scale) + 1.0)
        scale, shift = self.condition(condition).chunk(2, dim=-1)
        ones = torch.ones(x.shape[-1], device=x.device, dtype=at_least_fp32(x[..., :0]).dtype)
        scaled: Tensor = self._scaled(x, ones) * (1.0 + scale) + shift
        return scaled.to(x.dtype)

    def _scaled(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.centred:
            return layer_norm(x, weight, torch.zeros_like(weight), self.eps)
        return rms_norm(x, weight, self.eps)


class _ScaleAndShift(nn.Module):
    def __init__(self, condition_size: int, size: int, tp: Axis) -> None:
        super().__init__()
        self.tp = tp
        self.weight = nn.Parameter(torch.empty(2 * size, condition_size))
        self.bias = nn.Parameter(torch.empty(2 * size))

    def placements(self) -> dict[str, Placement]:
        return dict.fromkeys(("weight", "bias"), Placement(grad_sum=partial_over(self.tp)))

    def init_rules(self) -> dict[str, InitRule]:
        return {"weight": ZEROS, "bias": ZEROS}

    def forward(self, condition: Tensor) -> Tensor:
        both: Tensor = nn.functional.linear(condition, self.weight, self.bias)
        return both


def _adaptive_layernorm(size: int, eps: float, *, tp: Axis = NO_TP) -> AdaptiveNorm:
    return AdaptiveNorm(size, eps, centred=True, tp=tp)


MakeNorm = Callable[..., nn.Module]

NORMS: dict[str, MakeNorm] = {
    "rmsnorm": RMSNorm,
    "rmsnorm_zero_centred": ZeroCentredRMSNorm,
    "layernorm": LayerNorm,
    "dynamic_tanh": DynamicTanh,
    "adaptive_rmsnorm": AdaptiveNorm,
    "adaptive_layernorm": _adaptive_layernorm,
}
"""Each takes (size, eps, tp=...)."""
