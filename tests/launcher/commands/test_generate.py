"""`meshwright generate` as a user runs it: streaming, from every kind of folder, and what it refuses."""

import shutil
from pathlib import Path

import pytest
import torch
from faults.real_command import Done, run
from tiny_run import start

# Puts a mark into stdout each time that the model is asked for the next token.
MARKED_STEPS = """
import os
from meshwright.model.stack import LanguageModel
before = LanguageModel.step
def step(*args, **options):
    os.write(1, b"<step>")
    return before(*args, **options)
LanguageModel.step = step
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with an export; no test changes it."""
    folder = tmp_path_factory.mktemp("trained")
    start(folder, "model.moe.num_shared_experts=0")
    assert run("export", folder / "run", "--skip-verify").status == 0
    return folder / "run"


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may spoil."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def generate(source: Path, *options: object, **settings: object) -> Done:
    return run("generate", source, "--max-new-tokens", 8, *options, **settings)


def text_of(source: Path, *options: object, **settings: object) -> str:
    done = generate(source, *options, **settings)
    done.told(0)
    assert done.err == ""
    return done.out


def test_each_piece_is_printed_before_the_next_token_is_made(trained: Path) -> None:
    done = generate(trained, "-p", "tensor rank", "--temperature", 0, fault=MARKED_STEPS)
    first, *pieces, last = done.out.split("<step>")
    assert first == "tensor rank"
    assert len(pieces) == 7
    assert all(pieces)
    assert last.endswith("\n")


def test_a_prompt_from_stdin_gives_what_the_option_gives(trained: Path) -> None:
    text = text_of(trained, "-p", "tensor ra\u00e9k")
    assert text.startswith("tensor ra\u00e9k")
    assert text_of(trained, "-p", "-", stdin="tensor ra\u00e9k") == text


def test_the_seed_decides_and_greedy_needs_none(trained: Path) -> None:
    assert text_of(trained, "-p", "a", "--seed", 5) == text_of(trained, "-p", "a", "--seed", 5)
    assert text_of(trained, "-p", "a", "--seed", 5) != text_of(trained, "-p", "a", "--seed", 6)
    greedy = text_of(trained, "-p", "a", "--temperature", 0, "--seed", 5)
    assert greedy == text_of(trained, "-p", "a", "--temperature", 0, "--seed", 6)


def test_several_samples_come_one_after_the_other_and_differ(trained: Path) -> None:
    out = text_of(trained, "-p", "tensor", "--samples", 3)
    samples = [out.partition(f"--- {number}\n")[2].partition("--- ")[0] for number in (1, 2, 3)]
    assert all(sample.startswith("tensor") for sample in samples)
    assert len(set(samples)) == 3


def test_a_checkpoint_and_an_export_say_what_their_run_says(trained: Path) -> None:
    options = ("-p", "tensor rank", "--temperature", 0)
    text = text_of(trained, *options)
    assert text_of(trained / "checkpoints" / "step_00000006", *options) == text
    assert text_of(trained / "export", *options) == text
    assert text_of(trained / "checkpoints" / "step_00000003", *options) != text


def test_a_damaged_newest_checkpoint_is_passed_over_and_told(copy: Path) -> None:
    newest = copy / "checkpoints" / "step_00000006" / "rank_00000.bin"
    newest.write_bytes(newest.read_bytes()[:-4])
    done = generate(copy, "-p", "a", "--temperature", 0)
    done.told(0, "passed over", "step_00000006", "bytes")
    assert done.out == text_of(copy / "checkpoints" / "step_00000003", "-p", "a", "--temperature", 0)
    generate(newest.parent, "-p", "a").told(2, "is damaged", "rank_00000.bin")


def test_what_is_no_source_or_no_tokenizer_is_told(copy: Path, tmp_path: Path) -> None:
    generate(tmp_path / "none").told(2, "none: there is nothing; give a run's folder")
    generate(tmp_path).told(2, "neither a run, nor a checkpoint, nor an export")
    generate(copy, "--tokenizer", tmp_path / "none.json").told(2, "--tokenizer", "there is no such file")
    generate(copy, "--tokenizer", tmp_path).told(2, f"--tokenizer {tmp_path}", "is a folder; a file would fit")
    generate(copy, "--tokenizer", copy).told(2, f"is a folder; {copy}/tokenizer.json would fit")
    (tmp_path / "empty.json").write_text("{}")
    generate(copy, "--tokenizer", tmp_path / "empty.json").told(2, "empty.json", "is no tokenizer.json")
    (copy / "tokenizer.json").unlink()
    generate(copy, "-p", "a").told(2, "no tokenizer.json lies with it; give one with --tokenizer FILE")


def test_a_tokenizer_of_another_vocabulary_is_refused(trained: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({str(number): number for number in range(400)}, "0")).save(str(tmp_path / "other.json"))
    refused = generate(trained, "-p", "a", "--tokenizer", tmp_path / "other.json")
    refused.told(2, "other.json", "has 400 tokens, the model 320: it belongs to another model")


def test_options_that_cannot_be_honoured_are_told(trained: Path) -> None:
    refused = generate(trained, "--temperature", -1, "--top-p", 2, "--top-k", -3)
    refused.told(2, "3 problems", "temperature = -1.0", "top_p = 2.0", "top_k = -3")
    generate(trained, "--device", "tpu").told(2, "one of auto, cpu, cuda, mps would fit")
    missing = "mps" if torch.cuda.is_available() else "cuda"
    several = generate(trained, "--device", missing, "--top-k", "-1")
    several.told(2, f'--device "{missing}": ')
    several.told(2, "top_k = -1: ")
    generate(trained, "--device", "mps").told(2, "no Apple GPU")
    run("generate", trained, "--max-new-tokens", 10**13).told(2, "--max-new-tokens")
    run("generate", trained, "--samples", 10**11).told(2, "--samples", "1024")
    generate(trained, "--top-k", 10**20).told(2, "top_k = 1", "at most 16777216")
    generate(trained, "-p", "a\udcff").told(2, "--prompt is not UTF-8")


def test_what_learned_positions_cannot_hold_is_told_before_it_begins(tmp_path: Path) -> None:
    start(tmp_path, "model.position='learned'", "model.max_positions=16", "train.steps=1")
    run_folder = tmp_path / "run"
    refused = run("generate", run_folder, "-p", "a", "--max-new-tokens", 17)
    refused.told(2, "--max-new-tokens = 17: behind a prompt of 1 token needs 17 positions", "1 to 16 would fit")
    assert refused.out == ""
    run("generate", run_folder, "-p", "a", "--max-new-tokens", 16, "--temperature", 0).told(0)
    refused = run("generate", run_folder, "-p", "\u00e9" * 20, "--max-new-tokens", 1)
    refused.told(2, "the prompt has 40 tokens", "a prompt of 1 to 16 would fit")
