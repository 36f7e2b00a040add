"""An export computes in transformers what our model computes: logits, gradients, tokens, for every family."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
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

from meshwright.launcher.weights.read_weights import ExportWeights
from meshwright.launcher.weights.verify_export import VerificationText, verify_export
from meshwright.model.config import ModelConfig
from meshwright.model.families.choose import choose_family
from meshwright.parallel.where import Where, where_of_plain_tokens

transformers = pytest.importorskip("transformers")


@pytest.fixture(params=CONFIGS, scope="module")
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


def test_an_export_verifies(config: ModelConfig, tmp_path: Path) -> None:
    model = tiny_model(config)
    write_tiny_export(tmp_path, model, config)
    text = VerificationText(tiny_tokens(), "a test", tiny_tokenizer())
    report = verify_export(tmp_path, config, ModelWeights(model), model, text, dtype="fp32", new_tokens=8)
    assert report.failures() == []
    assert report.logits.largest_logit > 1.0  # the models are no zeros
    assert report.logits.max_difference < 1e-4
    assert report.greedy.compared > 48
    assert report.tensors.written == report.tensors.expected > 20


def test_gradients_of_one_batch_are_theirs(config: ModelConfig, tmp_path: Path) -> None:
    model = tiny_model(config)
    write_tiny_export(tmp_path, model, config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True, dtype=torch.float32)
    tokens = tiny_tokens(seq_len=9)
    inputs, targets = tokens[:-1], tokens[1:]
    our_loss = model(inputs, targets, where_counting(inputs))
    our_loss.backward()
    logits = theirs(input_ids=inputs.T).logits
    their_loss = F.cross_entropy(logits.flatten(0, 1), targets.T.flatten())
    their_loss.backward()

    torch.testing.assert_close(our_loss, their_loss)
    their_gradients = unfused(theirs)
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    rows = choose_family(config).mapping(config)
    assert {row.theirs for row in rows} == their_gradients.keys()
    for row in rows:
        gradient = ours[row.ours]
        assert gradient is not None
        mine = gradient if row.at is None else gradient[row.at]
        difference = (mine - their_gradients[row.theirs]).abs().max()
        assert difference <= 1e-5 * max(1.0, float(mine.abs().max())), row


def where_counting(inputs: torch.Tensor) -> Where:
    where = where_of_plain_tokens(inputs)
    assert where.step_tokens == inputs.numel()
    return where


def unfused(theirs: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients of a class under its on-disk names: in memory it stacks the experts."""
    gradients: dict[str, torch.Tensor] = {}
    is_mixtral = theirs.config.model_type == "mixtral"
    gate, up, down = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        disk = name.replace(".mlp.", ".block_sparse_moe.") if is_mixtral else name
        head, _, last = disk.rpartition(".")
        if last == "gate_up_proj":
            for at, fused in enumerate(parameter.grad):
                gradients[f"{head}.{at}.{gate}.weight"], gradients[f"{head}.{at}.{up}.weight"] = fused.chunk(2)
        elif last == "down_proj":
            for at, one in enumerate(parameter.grad):
                gradients[f"{head}.{at}.{down}.weight"] = one
        else:
            gradients[disk] = parameter.grad
    return gradients


def test_an_export_reads_back_under_our_names(config: ModelConfig, tmp_path: Path) -> None:
    model = tiny_model(config)
    write_tiny_export(tmp_path, model, config, max_shard_bytes=3000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    read = ExportWeights(tmp_path)
    parameters = dict(model.named_parameters())
    assert read.shapes() == {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        assert torch.equal(read.read(name), parameter)
        assert torch.equal(read.read(name, (1, 3)), parameter[1:3])


def test_the_exported_tokenizer_encodes_and_ends_as_ours(config: ModelConfig, tmp_path: Path) -> None:
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
