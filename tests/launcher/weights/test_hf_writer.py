"""A folder is written only from weights that are the model's."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from tiny_exports import CONFIGS, END, MOE, ModelWeights, tiny_config, tiny_model, tiny_tokenizer, write_tiny_export
from torch import Tensor

from meshwright.launcher.weights.hf_tokenizer import token_id
from meshwright.launcher.weights.hf_writer import ExportSettings, write_hf_folder
from meshwright.model.families.choose import NotRepresentableError

SETTINGS = ExportSettings(tiny_tokenizer(), END, max_positions=32)


class Changed:
    """Weights of which some are named or shaped otherwise."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], changes: Mapping[str, tuple[int, ...] | None]) -> None:
        changed = dict(shapes) | changes
        self._shapes = {name: shape for name, shape in changed.items() if shape is not None}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def buffers(self) -> Mapping[str, tuple[int, ...]]:
        return {}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        raise AssertionError("nothing may be read before all weights fit")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"final_norm.weight": None}, r"final_norm\.weight \[16\] is missing"),
        ({"layers.0.extra": (3,)}, r"layers\.0\.extra \[3\] has no place in the class"),
        (
            {"layers.0.feedforward.part.experts.gate": (5, 20, 16)},
            r"experts\.gate has the shape \[5, 20, 16\], the configuration says \[4, 20, 16\]",
        ),
    ],
)
def test_weights_of_another_model_are_refused_before_anything_is_written(
    changes: dict[str, tuple[int, ...] | None], problem: str, tmp_path: Path
) -> None:
    config = CONFIGS["mixtral"]
    weights = Changed(ModelWeights(tiny_model(config)).shapes(), changes)
    with pytest.raises(ValueError, match=problem):
        write_hf_folder(tmp_path, config, weights, SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_no_class_is_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = tiny_config(pattern="*E", moe=MOE.model_copy(update={"num_shared_experts": 1}))
    with pytest.raises(NotRepresentableError, match="num_shared_experts = 1"):
        write_hf_folder(tmp_path, config, ModelWeights(tiny_model(config)), SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_an_end_token_that_the_tokenizer_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="no token '</s>'"):
        token_id(tiny_tokenizer(), "</s>")


def test_a_tied_model_writes_no_output_matrix(tmp_path: Path) -> None:
    config = tiny_config(tie_embeddings=True)
    write_tiny_export(tmp_path, tiny_model(config), config)
    assert b"lm_head" not in (tmp_path / "model.safetensors").read_bytes()[:10_000]
