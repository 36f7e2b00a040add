"""The norms by name, and where they stand around a part: what a config can say of them (modules: model/norms.py).

    norm                   y                                              weights
    rmsnorm                x / rms(x) * w                                 weight
    rmsnorm_zero_centred   x / rms(x) * (1 + w), w begins at 0            weight
    layernorm              (x - mean) / std * w + b                       weight, bias
    dynamic_tanh           tanh(a x) * w + b, no statistics               alpha [1], weight, bias
    adaptive_rmsnorm       x / rms(x) * (1 + s), s learned                scale
    adaptive_layernorm     (x - mean) / std * (1 + s)                     scale

    placement     mixer                    feed-forward
    pre           x + f(norm(x))           the same
    post          norm(x + f(x))           the same                       (Vaswani et al. 2017)
    sandwich      x + norm(f(norm(x)))     the same                       (Gemma 2)
    branch        x + norm(f(x))           the same                       (OLMo 2)
    deepnorm      norm(alpha x + f(x))     the same                       (Wang et al. 2022)
    pre_post      x + f(norm(x))           norm(x + f(x))
    hybrid_norm   x + f(x)                 n + f(n), n = norm(x)          (Zhuo et al. 2025)

With hybrid_norm a mixer normalises q, k and v instead of what it takes: * L B do, other mixers are refused.

Nothing here loads torch.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

NormName = Literal[
    "rmsnorm", "rmsnorm_zero_centred", "layernorm", "dynamic_tanh", "adaptive_rmsnorm", "adaptive_layernorm"
]
Placing = Literal["pre", "post", "sandwich", "branch", "deepnorm", "pre_post", "hybrid_norm"]

_WEIGHTS: dict[str, tuple[str, ...]] = {
    "rmsnorm": ("weight",),
    "rmsnorm_zero_centred": ("weight",),
    "layernorm": ("weight", "bias"),
    "dynamic_tanh": ("alpha", "weight", "bias"),
    "adaptive_rmsnorm": ("scale",),
    "adaptive_layernorm": ("scale",),
}


class Form(NamedTuple):
    """Where a block has norms."""

    before: bool = False
    """Of what the part takes: `norm`."""
    carries_normed: bool = False
    """Whether the residual stream goes on as normalised."""
    after_branch: bool = False
    """Of what the part gives: `post_norm`."""
    after_sum: bool = False
    """Of the sum: `post_norm`."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the norms that there are."""
        return ("norm",) * self.before + ("post_norm",) * (self.after_branch or self.after_sum)


PRE, POST, BRANCH, BARE = Form(before=True), Form(after_sum=True), Form(after_branch=True), Form()

FORMS: dict[str, dict[str, Form]] = {
    "pre": {"mixer": PRE, "feedforward": PRE},
    "post": {"mixer": POST, "feedforward": POST},
    "sandwich": dict.fromkeys(("mixer", "feedforward"), Form(before=True, after_branch=True)),
    "branch": {"mixer": BRANCH, "feedforward": BRANCH},
    "deepnorm": {"mixer": POST, "feedforward": POST},
    "pre_post": {"mixer": PRE, "feedforward": POST},
    "hybrid_norm": {"mixer": BARE, "feedforward": Form(before=True, carries_normed=True)},
}


def norm_shapes(norm: str, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the parameters of a norm, with their shapes."""
    for name in _WEIGHTS[norm]:
        yield name, (1,) if name == "alpha" else (size,)


def deepnorm_alpha(num_layers: int) -> float:
    """Return what the stream is multiplied by in a decoder of so many layers (Wang et al. 2022, table 1)."""
    return float((2 * num_layers) ** 0.25)


def deepnorm_gain(num_layers: int) -> float:
    """Return what the initial values, outputs and feed-forwards are multiplied by (beta in the same table)."""
    return float((8 * num_layers) ** -0.25)
