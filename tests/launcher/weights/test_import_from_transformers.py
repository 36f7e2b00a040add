"""Folders that classes of transformers wrote are imported, whatever is left out of them or besides in them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_exports import CONFIGS

from meshwright.launcher.runfile.messages import ConfigError
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


@pytest.mark.parametrize(
    "model_type", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "granitemoehybrid", "qwen3_next"]
)
def test_experts_of_any_width_are_compared(model_type: str, tmp_path: Path) -> None:
    """The grouped product, which is the classes' default, takes no rows of 24 bytes."""
    widths = dict.fromkeys(("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 6)
    write_theirs(tmp_path / "theirs", model_type, **widths, shared_intermediate_size=6)
    import_theirs(tmp_path / "theirs")


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


@pytest.mark.parametrize("further_tokens", [0, 1])
def test_a_layer_that_config_json_has_lost_is_none_that_predicts_further_tokens(
    further_tokens: int, tmp_path: Path
) -> None:
    """Whatever the key says: the class itself writes 1 where its model has no such layer."""
    write_theirs(tmp_path, "deepseek_v3")
    config = json.loads((tmp_path / "config.json").read_text())
    lost = {"num_hidden_layers": 1, "num_nextn_predict_layers": further_tokens}
    (tmp_path / "config.json").write_text(json.dumps(config | lost))
    with pytest.raises(ConfigError) as refused:
        ExportWeights(tmp_path)
    assert "model.layers.1.input_layernorm.weight has no place in the class" in refused.value.problems
    assert all(line.startswith("model.layers.1.") for line in refused.value.problems[:-1])


def test_layers_that_predict_further_tokens_are_passed_over_with_all_that_they_hold(tmp_path: Path) -> None:
    write_theirs(tmp_path, "deepseek_v3")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    shapes = ExportWeights(tmp_path).shapes()
    plain = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.1.")}
    for number, mark in ((2, "eh_proj"), (3, "enorm")):
        begin = f"model.layers.{number}."
        tensors |= {name.replace("model.layers.1.", begin): tensor.clone() for name, tensor in plain.items()}
        tensors |= {f"{begin}{mark}.weight": torch.ones(16), f"{begin}shared_head.norm.weight": torch.ones(16)}
    save_file(tensors, path)
    assert ExportWeights(tmp_path).shapes() == shapes
    del tensors["model.layers.3.enorm.weight"]
    save_file(tensors | {"model.layers.1.eh_proj.weight": torch.ones(16)}, path)
    with pytest.raises(ConfigError) as refused:
        ExportWeights(tmp_path)
    begins = {line[: len("model.layers.1.")] for line in refused.value.problems}
    assert begins == {"model.layers.1.", "model.layers.3."}


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe", "granitemoehybrid", "qwen3_next"])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_the_weight_of_the_load_balancing_loss_goes_into_the_run_file_and_out_again(
    weight: float, model_type: str, tmp_path: Path
) -> None:
    write_theirs(tmp_path / "theirs", model_type, router_aux_loss_coef=weight)
    imported = import_run(ImportRequest(tmp_path / "theirs", tmp_path / "run.toml", store="store", verify=False))
    model = read_run_file(imported.run_file).model
    assert model.moe is not None
    assert model.moe.load_balancing_weight == weight
    assert FAMILIES[model_type].to_foreign(model)["router_aux_loss_coef"] == weight


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_one_normalised_expert_of_each_token_is_imported_and_only_its_training_refused(
    model_type: str, tmp_path: Path
) -> None:
    asked = {"num_experts_per_tok": 1} | ({"norm_topk_prob": True} if model_type == "qwen3_moe" else {})
    write_theirs(tmp_path / "theirs", model_type, **asked)
    imported = import_theirs(tmp_path / "theirs")
    assert imported.config.moe is not None
    assert (imported.config.moe.top_k, imported.config.moe.normalise_top_k) == (1, True)
    assert FAMILIES[model_type].reasons_against(imported.config) == []
    with pytest.raises(ConfigError, match=r"1 problem, .*\n  model\.moe\.top_k = 1: .* learns nothing from the loss"):
        read_run_file(imported.run_file)
    assert read_run_file(imported.run_file, ["model.moe.top_k=2"]).model.moe


@pytest.mark.parametrize("scales", [{"mscale": 0.7}, {"mscale_all_dim": 0.7}, {"mscale": 0.7, "attention_factor": 1.3}])
def test_scales_of_yarn_that_the_class_makes_nothing_of_are_left_out(scales: dict[str, float], tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    write_theirs(tmp_path / "theirs", "llama", rope_parameters=yarn | scales)
    scaling = read_run_file(import_theirs(tmp_path / "theirs").run_file).model.rope_scaling
    assert scaling is not None
    assert (scaling.mscale, scaling.mscale_all_dim) == (0.0, 0.0)
    assert scaling.attention_factor == scales.get("attention_factor", 0.0)


@pytest.mark.parametrize("model_type", ["mamba", "mixtral", "qwen3_moe", "qwen3_next"])
def test_a_run_file_without_dense_feed_forwards_has_no_width_of_them(model_type: str, tmp_path: Path) -> None:
    write_theirs(tmp_path / "theirs", model_type)
    imported = import_run(ImportRequest(tmp_path / "theirs", tmp_path / "run.toml", store="store", verify=False))
    assert not imported.config.has("mlp")
    assert "ffn_hidden_size" not in imported.run_file.read_text()
    read_run_file(imported.run_file)
