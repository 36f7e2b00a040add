"""Folders that classes of transformers wrote are imported, whatever is left out of them or besides in them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_exports import CONFIGS

from meshwright.launcher.runfile.read import read_run_file
from meshwright.launcher.weights.import_run import Imported, ImportRequest, failure_of, import_run
from meshwright.launcher.weights.read_weights import ExportWeights
from meshwright.model.families.choose import FAMILIES

transformers = pytest.importorskip("transformers")


def write_theirs(folder: Path, model_type: str, **changes: Any) -> None:
    """Let a class of transformers write a tiny model of itself, at random."""
    family, ours = FAMILIES[model_type], CONFIGS[model_type]
    keys = {key: values[0] for key, values in family.fixed.items()} | family.to_foreign(ours)
    config = transformers.AutoConfig.for_model(model_type, **keys | {"eos_token_id": None} | changes)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def import_theirs(folder: Path) -> Imported:
    """Import a folder, and see that both sides compute the same."""
    imported = import_run(ImportRequest(folder, folder.with_suffix(".toml"), store="store"))
    assert imported.logits is not None
    assert failure_of(imported.logits) is None
    assert imported.logits.largest_logit > 0.01
    return imported


@pytest.mark.parametrize(
    ("model_type", "dense"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 3}),
        ("qwen3_moe", {"mlp_only_layers": [0, 1]}),
        ("qwen3_next", {"decoder_sparse_step": 3}),
        ("deepseek_v3", {"first_k_dense_replace": 2}),
        ("granitemoehybrid", {"num_local_experts": 0}),
    ],
)
def test_a_class_of_experts_whose_layers_are_all_dense_is_a_dense_model(
    model_type: str, dense: dict[str, object], tmp_path: Path
) -> None:
    write_theirs(tmp_path / "theirs", model_type, **dense)
    imported = import_theirs(tmp_path / "theirs")
    model = read_run_file(imported.run_file).model
    assert model.moe is None
    assert {kinds.feedforward for kinds in model.layers} == {"mlp"}


@pytest.mark.parametrize("model_type", ["mamba", "mamba2"])
def test_a_key_of_first_values_does_not_change_what_weights_are_compared(model_type: str, tmp_path: Path) -> None:
    """The class divides the weights that it has just loaded once more, as if they were its first values."""
    folder = tmp_path / "theirs"
    write_theirs(folder, model_type, rescale_prenorm_residual=True)
    saved = load_file(folder / "model.safetensors")
    import_theirs(folder)
    for name in ("mixer.part.output.weight", "mixer.part.A_log"):
        read = ExportWeights(folder).read(f"layers.1.{name}")
        theirs = f"backbone.layers.1.{name.replace('part.', '').replace('output', 'out_proj')}"
        assert torch.equal(read, saved[theirs])
