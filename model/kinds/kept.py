"""Bytes that parts of every kind keep in the same way, for each token that a mixer of a rank sees."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshwright.model.kinds.kind import Degrees, Place, Types

if TYPE_CHECKING:
    from meshwright.model.config import ModelConfig

WIDENING = ("layernorm", "adaptive_layernorm")
"""Norms that are made of a copy in at least fp32."""


def norm_inputs(model: ModelConfig, place: Place, degrees: Degrees, types: Types) -> float:
    """Return what the inputs of a block's norms take: of the residual stream, or of what the part adds to it."""
    form = model.forms[place]
    of_stream = norm_input(model, types.stream, types) * (form.before + form.after_sum)
    return model.hidden_size / degrees.tp * (of_stream + norm_input(model, types.product, types) * form.after_branch)


def norm_input(model: ModelConfig, width: int, types: Types) -> int:
    """Return the bytes that a norm keeps of each number that it takes, which has `width`; LayerNorm makes it wide."""
    return types.wide if model.norm in WIDENING else width


def normed_input(model: ModelConfig, products: int, degrees: Degrees, types: Types) -> float:
    """Return what so many products of one normed input keep of it.

    Under autocast each keeps a copy of its own; over tp they share one, of a rank's own tokens.
    """
    kept = types.inputs(products) if degrees.tp == 1 else types.product
    return model.hidden_size / degrees.tp * kept
