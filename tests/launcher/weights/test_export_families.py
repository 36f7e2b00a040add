"""An export computes in transformers what our model computes: logits, gradients, tokens, for every family."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_exports import (
    CONFIGS,
    END,
    TEXT,
    ModelWeights,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
    tiny_tokens,
    write_tiny_export,
)
from tokenizers import Tokenizer

from meshwright.launcher.build import empty_model
from meshwright.launcher.weights.read_weights import ExportWeights, fill_model
from meshwright.launcher.weights.rows import joined
from meshwright.launcher.weights.verify_export import VerificationText, verify_export
from meshwright.model.config import ModelConfig
from meshwright.model.families.choose import choose_family
from meshwright.model.families.family import BUFFERS, Source
from meshwright.model.stack import LanguageModel
from meshwright.parallel.where import Where, where_of_plain_tokens

transformers = pytest.importorskip("transformers")

ROUTER_BIAS = "e_score_correction_bias"
# What changes nothing of what is computed, or is of parts that the model has not.
WITHOUT_A_NAME = {
    "pattern": True,  # may be written in several ways: its layers are compared
    **dict.fromkeys(("num_heads", "num_kv_heads", "head_dim", "ffn_hidden_size", "rope_base", "rope_fraction"), True),
    "moe": {"load_balancing", "load_balancing_weight", "z_loss_weight"},
    "mamba2": {"chunk_size"},
    "mamba1": {"chunk_size", "inner_size"},
}


class Exported(NamedTuple):
    """A model of this process, and what was written of it."""

    name: str
    config: ModelConfig
    model: LanguageModel
    folder: Path


# Of each family its plainest model by default.
PARAMS = [pytest.param(name, marks=[pytest.mark.slow] if " " in name else []) for name in CONFIGS]


@pytest.fixture(params=PARAMS, scope="module")
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    config, folder = CONFIGS[request.param], tmp_path_factory.mktemp("export")
    model = tiny_model(config)
    write_tiny_export(folder, model, config)
    return Exported(request.param, config, model, folder)


def test_an_export_verifies(exported: Exported) -> None:
    name, config, model, folder = exported
    assert choose_family(config).model_type == name.split()[0]
    text = VerificationText(tiny_tokens(seq_len=16), "a test", tiny_tokenizer())
    report = verify_export(folder, config, ModelWeights(model), model, text, dtype="fp32", new_tokens=4)
    assert report.failures() == []
    assert report.logits.largest_logit > 1.0  # the models are no zeros
    assert report.logits.max_difference < 1e-4
    assert report.greedy.compared == 2 * 16 + 4
    assert report.tensors.written == report.tensors.expected > 10


def test_gradients_of_one_batch_are_theirs(exported: Exported, tmp_path: Path) -> None:
    _, config, model, folder = exported
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    tokens = tiny_tokens(seq_len=9)
    inputs, targets = tokens[:-1], tokens[1:]
    model.zero_grad()
    our_loss = model(inputs, targets, where_counting(inputs))
    our_loss.backward()
    logits = theirs(input_ids=inputs.T).logits
    their_loss = F.cross_entropy(logits.flatten(0, 1), targets.T.flatten())
    their_loss.backward()

    torch.testing.assert_close(our_loss, their_loss)
    written = gradients_as_written(theirs, tmp_path / "gradients")
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    rows = [row for row in choose_family(config).mapping(config) if not row.sources[0].ours.startswith(BUFFERS)]
    assert {row.theirs for row in rows} == written.keys()
    for row in rows:
        parts = [gradient_of(ours, source) for source in row.sources]
        mine = joined(row, parts)
        difference = (mine - written[row.theirs]).abs().max()
        assert difference <= 1e-5 * max(1.0, float(mine.abs().max())), row


def gradient_of(gradients: dict[str, torch.Tensor | None], source: Source) -> torch.Tensor:
    gradient = gradients[source.ours]
    assert gradient is not None
    return gradient if source.at is None else gradient[source.at]


def where_counting(inputs: torch.Tensor) -> Where:
    where = where_of_plain_tokens(inputs)
    assert where.step_tokens == inputs.numel()
    return where


def gradients_as_written(theirs: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """Return a class's gradients under its on-disk names: in memory it stacks experts, and it unstacks to write."""
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    theirs.save_pretrained(folder)
    written: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    buffers = {name for name in written if name.endswith(ROUTER_BIAS)}
    return {name: tensor for name, tensor in written.items() if name not in buffers}


def test_an_export_reads_back_under_our_names(exported: Exported, tmp_path: Path) -> None:
    _, config, model, _ = exported
    write_tiny_export(tmp_path, model, config, max_shard_bytes=3000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    read, weights = ExportWeights(tmp_path), ModelWeights(model)
    assert read.config.layers == config.layers
    assert read.config.model_dump(exclude=WITHOUT_A_NAME) == config.model_dump(exclude=WITHOUT_A_NAME)
    assert read.shapes() == weights.shapes()
    assert read.buffers().items() <= weights.buffers().items()
    for name, shape in {**read.shapes(), **read.buffers()}.items():
        expected = weights.read(name)
        assert shape == tuple(expected.shape)
        assert torch.equal(read.read(name), expected), name
        for rows in [(1, min(3, shape[0])), (0, 1), (min(2, shape[0] - 1), shape[0]), (1, 1)]:
            assert torch.equal(read.read(name, rows), expected[slice(*rows)]), (name, rows)


@pytest.mark.slow  # the test above holds the weights and the config each
def test_a_model_of_an_import_computes_the_same(exported: Exported) -> None:
    _, _, model, folder = exported
    weights = ExportWeights(folder)
    read = empty_model(weights.config, torch.device("cpu"))
    fill_model(read, weights)
    tokens = tiny_tokens(seq_len=12)
    torch.testing.assert_close(read(tokens), model(tokens), rtol=0.0, atol=1e-5)  # chunks may have another length


def test_the_exported_tokenizer_encodes_and_ends_as_ours(tmp_path: Path) -> None:
    config = CONFIGS["llama"]
    write_tiny_export(tmp_path, tiny_model(config), config)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    own = Tokenizer.from_str(tiny_tokenizer())
    for text in (TEXT, "  two  spaces , and 'quotes'\t\n\n", f"caf\u00e9 \u4f60\u597d {END} after", "a . b ? c !"):
        assert theirs(text)["input_ids"] == own.encode(text).ids
        assert theirs.decode(own.encode(text).ids) == text
    assert theirs.eos_token == END
    assert theirs.eos_token_id == own.token_to_id(END)
    assert len(theirs) == 300


def test_config_json_has_both_spellings_and_the_models_vocabulary(tmp_path: Path) -> None:
    config = CONFIGS["qwen3_moe"]
    write_tiny_export(tmp_path, tiny_model(config), config, dtype="bf16")
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["vocab_size"] == 320  # the model's, not the tokenizer's 300
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == config.rope_base
    assert written["num_experts"] == written["num_local_experts"] == 4
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    assert written["bos_token_id"] is None
    assert written["eos_token_id"] == 0
    assert written["max_position_embeddings"] == 32


def test_generation_stops_at_the_end_token(tmp_path: Path) -> None:
    config = tiny_config(tie_embeddings=True)
    model = tiny_model(config)
    with torch.no_grad():  # make the end of text the most likely token everywhere
        model.final_norm.weight.zero_()
        model.final_norm.weight[0] = 1.0
        model.embedding.weight[:, 0] = 0.0
        model.embedding.weight[0, 0] = 1.0
        model.embedding.weight[1:, 0] = -1.0
    write_tiny_export(tmp_path, model, config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    prompt = torch.tensor([[0]])
    generated = theirs.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5)
    assert generated.tolist() == [[0, 0]]
