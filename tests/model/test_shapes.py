"""The table of names and shapes is that of the models that are built."""

import pytest
from engine_cases import dense_config, moe_config

from meshwright.model.config import ModelConfig
from meshwright.model.costs import parameter_count
from meshwright.model.parts import build_model
from meshwright.model.shapes import parameter_shapes, weights

ALL_BIASES = ("q", "k", "v", "output", "ffn")


@pytest.mark.parametrize(
    "config",
    [
        dense_config(),
        dense_config(tie_embeddings=True, bias=("k", "output")),
        dense_config(pattern="**--", num_layers=6),
        moe_config(pattern="*-E*E", num_layers=6, bias=ALL_BIASES),
        moe_config(num_shared_experts=0, qk_norm=False),
    ],
)
def test_names_shapes_and_order_are_those_of_the_model(config: ModelConfig) -> None:
    built = {name: tuple(parameter.shape) for name, parameter in build_model(config, device="meta").named_parameters()}
    shapes = parameter_shapes(config)
    assert list(shapes.items()) == list(built.items())
    of_experts = [name for name, weight in weights(config).items() if weight.is_of_experts]
    assert of_experts == [name for name in built if "experts" in name.split(".")]
    numbers = 0
    for shape in shapes.values():
        number = 1
        for size in shape:
            number *= size
        numbers += number
    assert numbers == parameter_count(config)
