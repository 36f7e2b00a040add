"""A model of one process is filled only by weights that are exactly its own; text streams in whole characters."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import build, start
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from meshwright.launcher import inference
from meshwright.launcher.build import empty_model
from meshwright.launcher.generation import continue_prompt, read_tokenizer, stream
from meshwright.launcher.inference import Loaded, load_for_inference
from meshwright.launcher.runfile.messages import ConfigError
from meshwright.launcher.weights.read_weights import find_source
from meshwright.launcher.weights.saved_run import read_saved_run
from meshwright.model.generation.sampling import Sampling

GREEDY = Sampling(0.0, 0, 1.0)


def test_a_checkpoint_is_loaded_with_the_weights_of_its_run(tmp_path: Path) -> None:
    run = start(tmp_path, "train.steps=1", "evaluation.every=0")
    loaded = load_for_inference(tmp_path / "run")
    held = dict(loaded.model.named_parameters())
    for name, part in run.engine.parts.items():
        assert torch.equal(held[name], part.parameter.reshape(held[name].shape)), name
    assert loaded.end_of_text == "<|endoftext|>"
    assert loaded.tokenizer == tmp_path / "run" / "tokenizer.json"
    assert loaded.source.name == "step_00000001"
    assert loaded.passed_over == {}


def test_weights_that_are_not_exactly_the_models_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(tmp_path, "train.steps=1", "evaluation.every=0")
    smaller = build(tmp_path, ["model.num_layers=1"]).run_file.model
    # A run file that does not belong to the weights beside it: without the check, half of them would stay unread.
    saved = read_saved_run(find_source(tmp_path / "run"))
    other = replace(saved, run_file=saved.run_file.model_copy(update={"model": smaller}))
    monkeypatch.setattr(inference, "read_saved_run", lambda source: other)
    with pytest.raises(ConfigError, match=r"layers.1.mixer.part.q.weight is not of this model"):
        load_for_inference(tmp_path / "run")


@pytest.mark.parametrize(("eos", "found"), [("</s>", "</s>"), ({"content": "</s>"}, "</s>"), (None, None)])
def test_the_end_token_of_an_export_is_what_its_settings_say(tmp_path: Path, eos: object, found: str | None) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    assert inference._of_export(tmp_path) == found


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[[", "is damaged: not JSON (Expecting value"),
        ("[]", "is damaged: not a JSON object"),
        ('{"eos_token": 3}', "eos_token = 3: must be text, or null"),
        ('{"eos_token": {"content": [1]}}', "eos_token = [1]: must be text, or null"),
    ],
)
def test_broken_settings_of_a_tokenizer_are_told_with_their_file(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        inference._of_export(tmp_path)
    assert caught.value.source == str(tmp_path / "tokenizer_config.json")
    assert caught.value.problems[0].startswith(told)
    assert len(caught.value.problems) == 1


def bytes_only() -> Tokenizer:
    """A tokenizer whose tokens are single bytes, so that most characters are several tokens."""
    codec = Tokenizer(models.BPE())
    codec.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    codec.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    codec.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    return codec


def test_a_character_of_several_tokens_comes_in_one_piece() -> None:
    codec = bytes_only()
    text = "a\u00e9\u20ac\U0001f600z"
    ids = codec.encode(text).ids
    assert len(ids) == 1 + 2 + 3 + 4 + 1
    assert list(stream(codec, [], iter(ids))) == ["a", "\u00e9", "\u20ac", "\U0001f600", "z"]
    assert list(stream(codec, [], iter(ids[:4])))[:2] == ["a", "\u00e9"]  # what stays half is given at the end
    assert "".join(stream(codec, ids[:5], iter(ids[5:]))) == codec.decode(ids)[len(codec.decode(ids[:5])) :]


def test_spaces_between_tokens_survive_where_a_token_alone_would_lose_them() -> None:
    codec = Tokenizer(models.WordLevel({"\u2581a": 0, "\u2581rank": 1, "s": 2, "?": 3}, "?"))
    codec.decoder = decoders.Metaspace()
    assert codec.decode([1]) == "rank"
    assert list(stream(codec, [0], iter([1, 2, 0]))) == [" rank", "s", " a"]


def test_the_end_token_ends_the_text_and_is_not_shown() -> None:
    codec = bytes_only()
    a, b = codec.encode("ab").ids
    assert list(stream(codec, [], iter([a, b, a]), end_token=b)) == ["a"]


def test_a_tokenizer_that_cuts_its_input_short_reads_the_whole_prompt(tmp_path: Path) -> None:
    codec = bytes_only()
    codec.enable_truncation(2)
    codec.save(str(tmp_path / "tokenizer.json"))
    assert len(read_tokenizer(tmp_path / "tokenizer.json", 256).encode("abcdef").ids) == 6


def test_without_a_prompt_a_document_begins_if_the_model_has_an_end_token(tmp_path: Path) -> None:
    codec = bytes_only()
    codec.save(str(tmp_path / "tokenizer.json"))
    config = build(tmp_path, []).run_file.model
    model = empty_model(config, torch.device("cpu"))
    torch.nn.init.zeros_(model.embedding.weight)
    loaded = Loaded(model, config, tmp_path / "tokenizer.json", None, tmp_path, {})
    with pytest.raises(ConfigError, match="the prompt is empty and there is no end-of-text token to begin from"):
        list(continue_prompt(loaded, "", 1, GREEDY))
