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


def sequence_states(decay: float, state: float, degrees: Degrees) -> float:
    """Return how many numbers a recurrence over cp keeps of a sample, to know what the chunks before each leave.

    `decay` and `state` are what a chunk does to a state: all ranks have those of all chunks, two a rank, and fold them
    up to their own second chunk, keeping the state before each: so many on average.
    """
    return 2 * degrees.cp * (decay + state) + (3 * degrees.cp + 1) / 2 * state if degrees.cp > 1 else 0.0


def halo_numbers(channels: float, conv_kernel: int, degrees: Degrees) -> float:
    """Return how many numbers a convolution over cp keeps of the tokens before a rank's two chunks of a sample."""
    return 2 * (conv_kernel - 1) * channels if degrees.cp > 1 else 0.0


def normed_input(model: ModelConfig, products: int, degrees: Degrees, types: Types) -> float:
    """Return what so many products of one normed input keep of it.

    Under autocast each keeps a copy of its own; over tp they share one, of a rank's own tokens.
    """
    kept = types.inputs(products) if degrees.tp == 1 else types.product
    return model.hidden_size / degrees.tp * kept
