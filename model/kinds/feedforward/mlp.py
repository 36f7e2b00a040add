"""The dense feed-forward as a description (module: feedforward/mlp.py); its keys stand in [model].

    gated activation   gate, up [f, h]   down [h, f]     and a bias each with "ffn" in model.bias
    plain activation         up [f, h]   down [h, f]

Kept for each token: h/tp of the norm's input, h/tp of the normed one, 3f/tp of gate, up and f(gate) * up; 2f/tp of up
and f(up) with a plain one. Dropout keeps nothing more: what it gives takes the place of what it takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from meshwright.model.kinds.kept import norm_inputs, normed_input
from meshwright.model.kinds.kind import OVER_TP, Degrees, Kind, Named, Need, Types, matrix, vector

if TYPE_CHECKING:
    from meshwright.model.config import ModelConfig
    from meshwright.model.kinds.small import Small


# The names in kernels/activations.py, which loads torch.
FfnActivation = Literal[
    "swiglu", "geglu", "geglu_erf", "reglu", "glu", "relu", "gelu", "gelu_tanh", "silu", "relu2"
]  # fmt: skip
GATED = frozenset({"swiglu", "geglu", "geglu_erf", "reglu", "glu"})


@dataclass(frozen=True, eq=False)
class MlpKind(Kind):
    """A feed-forward of width `ffn_hidden_size`."""

    reads: ClassVar[frozenset[str]] = frozenset({"ffn_hidden_size", "ffn_activation", "ffn_dropout", "bias.ffn"})

    def weights(self, model: ModelConfig) -> Named:
        """Yield the two or three matrices and their biases."""
        return mlp_weights(model, model.ffn_hidden_size)

    def kept(self, model: ModelConfig, degrees: Degrees, types: Types) -> float:
        """Return what stands at the head of this file."""
        return norm_inputs(model, self.place, degrees, types) + mlp_kept(model, model.ffn_hidden_size, degrees, types)

    def needs(self, model: ModelConfig) -> list[Need]:
        """Return that tp divides the width."""
        return [Need("tp", "model.ffn_hidden_size", model.ffn_hidden_size)]

    def narrowed(self, model: ModelConfig, small: Small, above: int) -> dict[str, Any]:
        """Return a small width."""
        width = small.inner(model.ffn_hidden_size, small.target.tp, small.needs.tp, above=above)
        return {"ffn_hidden_size": width}


def inwards(model: ModelConfig) -> tuple[str, ...]:
    """Return the names of the matrices that take the feed-forward's input."""
    return ("gate", "up") if model.ffn_activation in GATED else ("up",)


def mlp_weights(model: ModelConfig, width: int) -> Named:
    """Yield the matrices of a feed-forward, and their biases."""
    h = model.hidden_size
    matrices = {name: (matrix(width, h, OVER_TP), vector(width, OVER_TP)) for name in inwards(model)}
    matrices["down"] = (matrix(h, width, OVER_TP), vector(h))
    for name, (weight, bias) in matrices.items():
        yield f"{name}.weight", weight
        if "ffn" in model.bias:
            yield f"{name}.bias", bias


def mlp_kept(model: ModelConfig, width: int, degrees: Degrees, types: Types) -> float:
    """Return what a feed-forward keeps, its normed input among it."""
    columns = len(inwards(model))
    return normed_input(model, columns, degrees, types) + (columns + 1) * width / degrees.tp * types.product
