"""The tokenizer of a store: trained alike each time, or the user's own, with an end of text that no text can forge."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from meshwright.data.errors import DataError
from meshwright.data.tokenizer import END_OF_TEXT, LONGEST_WORD, load_tokenizer, open_tokenizer, train_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog; the quick brown fox sleeps. " * 5


def save(path: Path, vocab: dict[str, int], special: tuple[str, ...] = ()) -> Path:
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(path))
    return path


def test_training_twice_gives_the_same_file() -> None:
    assert train_tokenizer([TEXT], 300).json == train_tokenizer([TEXT], 300).json


def test_a_trained_tokenizer_is_byte_level_with_the_end_first_and_loses_nothing() -> None:
    trained = train_tokenizer([TEXT], 290)
    assert (trained.end_of_text, trained.end_of_text_id, trained.vocab_size) == (END_OF_TEXT, 0, 290)
    content = json.loads(trained.json)
    assert content["model"]["type"] == "BPE"
    assert content["pre_tokenizer"] == {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    tokenizer = open_tokenizer(trained.json)
    for text in ("the fox", "  tabs\t\r\n", "caf\u00e9 \U0001f600 \x00", "never seen Zebra"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert sorted(content["model"]["vocab"].values()) == list(range(290))
    assert (
        len([token for token, number in content["model"]["vocab"].items() if 1 <= number <= 256 and len(token) == 1])
        == 256
    )


def test_a_text_too_small_for_the_vocabulary_gives_a_smaller_one_that_says_so() -> None:
    trained = train_tokenizer(["aa bb"], 5000)
    assert trained.vocab_size < 270
    assert f"{trained.vocab_size} of 5000 tokens" in trained.origin


@pytest.mark.parametrize("run", ["a", " ", "0", "-", "\u4e2d"])
def test_a_long_run_is_trained_on_in_pieces(run: str) -> None:
    # Whole, a run of 10,000 gives tokens of thousands of bytes, in time that grows with its square.
    vocabulary = open_tokenizer(train_tokenizer([f"so {run * 10_000} on"], 300).json).get_vocab()
    assert LONGEST_WORD / 2 <= max(map(len, vocabulary)) <= LONGEST_WORD


def test_a_text_without_long_runs_gives_the_same_tokenizer_as_uncut() -> None:
    longest = "x" * (LONGEST_WORD // 2)  # twice in a row, and within the limit
    text = f"{TEXT} {longest}y {longest * 2:.{LONGEST_WORD - 1}} caf\u00e9 {' ' * (LONGEST_WORD - 4)}\n\n"
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    uncut = Tokenizer(models.BPE())
    uncut.pre_tokenizer = byte_level
    alphabet = sorted(byte_level.alphabet())
    uncut.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=340,
            min_frequency=2,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    trained = json.loads(train_tokenizer([text], 340).json)
    assert trained["model"] == json.loads(uncut.to_str())["model"]
    assert len(trained["model"]["merges"]) > 40


def test_the_unknown_token_is_found_in_the_files_own_terms(tmp_path: Path) -> None:
    loaded = load_tokenizer(save(tmp_path / "word.json", {"a": 3, "</s>": 1}))
    assert (loaded.unknown, loaded.unknown_id) == ("a", 3)
    Tokenizer(models.Unigram([("</s>", 0.0), ("x", -1.0), ("?", -2.0)], unk_id=2)).save(str(tmp_path / "unigram.json"))
    loaded = load_tokenizer(tmp_path / "unigram.json")
    assert (loaded.unknown, loaded.unknown_id) == ("?", 2)
    (tmp_path / "bytes.json").write_bytes(train_tokenizer([TEXT], 300).json)
    assert load_tokenizer(tmp_path / "bytes.json").unknown_id is None


def test_the_name_of_the_end_within_a_text_is_plain_text() -> None:
    trained = train_tokenizer([TEXT], 300)
    tokenizer = open_tokenizer(trained.json)
    ids = tokenizer.encode(f"the{END_OF_TEXT}fox").ids
    assert trained.end_of_text_id not in ids
    assert tokenizer.decode(ids) == f"the{END_OF_TEXT}fox"


def test_truncation_padding_and_added_tokens_of_the_users_file_do_not_reach_the_store(tmp_path: Path) -> None:
    path = save(tmp_path / "t.json", {"a": 0, "b": 1}, special=("</s>", "<s>"))
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 3)])
    tokenizer.save(str(path))
    opened = open_tokenizer(load_tokenizer(path).json)
    (encoding,) = opened.encode_batch_fast(["a b a b a"], add_special_tokens=False)
    assert encoding.ids == [0, 1, 0, 1, 0]


def test_the_usual_end_of_text_is_found_and_ids_with_gaps_count_whole(tmp_path: Path) -> None:
    path = save(tmp_path / "t.json", {"a": 0, "b": 7, "<eos>": 70_000})
    loaded = load_tokenizer(path)
    assert (loaded.end_of_text, loaded.end_of_text_id, loaded.vocab_size) == ("<eos>", 70_000, 70_001)
    assert loaded.json == path.read_bytes()
    assert load_tokenizer(path, "b").end_of_text_id == 7


def test_an_end_of_text_that_is_missing_or_ambiguous_must_be_named(tmp_path: Path) -> None:
    none = save(tmp_path / "none.json", {"a": 0}, special=("<x>",))
    with pytest.raises(DataError, match=r"which token ends a document\? It has none of .* --end-of-text .*are <x>"):
        load_tokenizer(none)
    two = save(tmp_path / "two.json", {"a": 0}, special=("</s>", "<eos>"))
    with pytest.raises(DataError, match=r"It has </s> and <eos>; name it with --end-of-text"):
        load_tokenizer(two)
    with pytest.raises(DataError, match=r"--end-of-text <nope>: .* has no such token"):
        load_tokenizer(two, "<nope>")


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{"model": {}}')
    with pytest.raises(DataError, match=r"t\.json is no tokenizer\.json"):
        load_tokenizer(tmp_path / "t.json")
    with pytest.raises(DataError, match="cannot be read: No such file"):
        load_tokenizer(tmp_path / "other.json")
