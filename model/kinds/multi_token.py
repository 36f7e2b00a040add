"""Predicting further tokens: its table [model.multi_token] and its description (module: model/multi_token.py).

    multi_token.<k>.{hidden, embedding, final}_norm.*   projection.weight [h, 2h]   layer.*, of the last layer's kinds

The embedding and the output are the model's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, Field, NonNegativeFloat

from meshwright.model.kinds.kind import OVER_TP, Named, Need, Weight, matrix
from meshwright.model.kinds.norms import norm_shapes
from meshwright.model.kinds.sizes import TABLE

if TYPE_CHECKING:
    from meshwright.model.config import ModelConfig


class MultiTokenConfig(BaseModel):
    """Further tokens that are predicted in training, each by one more layer behind the stack (DeepSeek-V3)."""

    model_config = TABLE

    depth: Annotated[int, Field(gt=0, le=16)] = 1
    """How many further tokens; 1 is usual. Each costs a layer and the output's operations once more."""
    loss_weight: NonNegativeFloat = 0.1
    """Weight of the mean of their losses; 0.3 falling to 0.1 in DeepSeek-V3."""


def multi_token_weights(model: ModelConfig, layer: dict[str, Weight]) -> Named:
    """Yield the parameters of all further predictions; `layer` are those of the last layer, by their names in it."""
    h = model.hidden_size
    for depth in range(model.further_tokens):
        for place in ("hidden_norm", "embedding_norm"):
            for name, shape in norm_shapes(model.norm, h):
                yield f"multi_token.{depth}.{place}.{name}", Weight(shape)
        yield f"multi_token.{depth}.projection.weight", matrix(h, 2 * h, OVER_TP)
        for name, weight in layer.items():
            yield f"multi_token.{depth}.layer.{name}", weight
        for name, shape in norm_shapes(model.norm, h):
            yield f"multi_token.{depth}.final_norm.{name}", Weight(shape)


def multi_token_needs(model: ModelConfig) -> list[Need]:
    """Return that tp divides the width that the projection gives."""
    return [Need("tp", "model.hidden_size", model.hidden_size)] if model.further_tokens else []
