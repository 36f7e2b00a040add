"""Mixture-of-Depths as a description (module: model/depth.py): its table [model.depth], its weights and bytes.

    [*-]   a layer around which a router lets only some tokens in

    router.weight [1, h]   predictor.inward [p, h]   predictor.weight [1, p]     beside those of the layer's parts

Operations and bytes of the parts are those of the chosen tokens alone, `capacity` of all. Kept besides, for every
token: h/tp of the layer's input in at least fp32, h/tp of what is added to it, and 2p/tp of the predictor.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, Field, NonNegativeFloat

from meshwright.model.kinds.kind import Degrees, Named, Types, matrix
from meshwright.model.kinds.sizes import TABLE, Size, exact_share

if TYPE_CHECKING:
    from meshwright.model.config import ModelConfig


class DepthConfig(BaseModel):
    """Mixture-of-Depths: what stands in [ ] in the pattern is a layer that only some tokens go through."""

    model_config = TABLE

    capacity: Annotated[float, Field(gt=0.0, le=1.0)] = 0.125
    """The share of a sequence's tokens that goes through; 0.125 in every other layer is the paper's best."""
    gate: Literal["score", "sigmoid"] = "score"
    """What the layer's result is multiplied by: the router's score, as in the paper, or its sigmoid."""
    predictor_size: Size = 32
    """Inner width of the predictor, which reads a token, tells whether it would be chosen, and decides in decoding."""
    predictor_weight: NonNegativeFloat = 0.01
    """Weight of the predictor's loss; its gradient does not reach the stream."""


def depth_of(model: ModelConfig) -> DepthConfig:
    """Return the table, which the checks see to."""
    assert model.depth is not None, "the checks let no [ ] pass without a [model.depth]"
    return model.depth


def depth_weights(model: ModelConfig) -> Named:
    """Yield the router's and the predictor's parameters."""
    yield "router.weight", matrix(1, model.hidden_size)
    yield "predictor.inward", matrix(depth_of(model).predictor_size, model.hidden_size)
    yield "predictor.weight", matrix(1, depth_of(model).predictor_size)


def depth_rows(model: ModelConfig, length: int, degrees: Degrees) -> int:
    """Return how many tokens of a sample of `length` the layer sees; over tp as many on each rank."""
    return -(-ceil(exact_share(depth_of(model).capacity) * length) // degrees.tp) * degrees.tp


def depth_kept(model: ModelConfig, degrees: Degrees, types: Types) -> float:
    """Return what is kept of every token, whether it goes through or not."""
    of_predictor = 2 * depth_of(model).predictor_size / degrees.tp * types.wide
    return model.hidden_size / degrees.tp * (types.wide + types.stream) + of_predictor
