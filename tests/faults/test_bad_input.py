"""Every line of the issue's "Bad input", through the real command: a clear error, the right status, nothing lost.

Where each is held to it; a detail is tested where the code is, under tests/.

    line of the issue                 here, end to end                      in detail
    unknown key, wrong type,          test_mistakes_in_a_run_file_...       launcher/runfile/test_read.py,
      sizes that do not divide                                                test_cross_checks.py, test_overrides.py
    an empty corpus, not UTF-8        test_a_corpus_that_is_empty_or_...    data/test_documents.py, data/test_prepare.py
    a shard cut short                 test_a_shard_cut_short_...            data/test_fast_read.py, data/test_store.py
    a flipped byte in a shard         test_a_flipped_byte_...               data/test_fast_read.py
                                        and test_ranks.py (two ranks)
    a tokenizer of another            test_a_tokenizer_of_another_...       data/test_store.py, data/test_tokenizer.py
      vocabulary                        and commands/test_generate.py
    a checkpoint cut short            test_a_checkpoint_cut_short_...       parallel/checkpoint/test_damage.py
    a checkpoint of another model     test_a_checkpoint_of_another_...      the same, launcher/training/test_resume.py
    a full disk while saving          test_ranks.py, one disk of two        parallel/checkpoint/test_full_disk.py
    kill -9 in the middle of a save   test_ranks.py, resumed bitwise        parallel/checkpoint/test_kill.py
    NaN loss                          test_a_loss_that_is_no_number_...     launcher/training/test_loop.py
    a port in use                     test_a_port_in_use_...                launcher/test_rendezvous.py
    a rank that dies                  test_ranks.py                         launcher/test_local_ranks.py
"""

import shutil
import socket
from pathlib import Path

import pytest
from faults.real_command import launch, run
from tiny_run import checkpoint_bytes, numbers, start, tiny_store, write_run_file

# The weights become not a number before step 5.
POISON_STEP_5 = """
import torch
from meshwright.launcher.training import loop
before = loop.one_step
def one_step(run, batch, at, *args, **kwargs):
    if at == 4 and rank == 0:
        with torch.no_grad():
            run.model.final_norm.weight.fill_(float("nan"))
    return before(run, batch, at, *args, **kwargs)
loop.one_step = one_step
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with checkpoints of steps 3 and 6; no test changes it."""
    folder = tmp_path_factory.mktemp("trained")
    start(folder)
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may spoil."""
    shutil.copytree(trained / "run", tmp_path / "run")
    return tmp_path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A copy of the store that a test may spoil."""
    return Path(shutil.copytree(tiny_store(), tmp_path / "store"))


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def spoil(path: Path, *, cut: int = 0, flip: int = 0) -> None:
    """Cut bytes off a file's end, or flip a bit of one byte."""
    content = bytearray(path.read_bytes())
    if flip:
        content[flip] ^= 1
    path.write_bytes(content[: len(content) - cut])


def test_mistakes_in_a_run_file_are_told_all_at_once_and_nothing_is_begun(tmp_path: Path) -> None:
    of_the_file = ("train.stps=3", "train.steps=many", "model.num_heads=3", "parallel.ep=3")
    of_folders = ("data.seq_len=999999", "model.vocab_size=12", f"init.from={tmp_path / 'none'}")
    refused = run("train", write_run_file(tmp_path), *of_the_file, *of_folders)
    refused.told(2, "train.stps: no such key; did you mean train.steps?")
    refused.told(2, 'train.steps = "many": must be a whole number')
    refused.told(2, "model.num_heads = 3: must divide model.hidden_size = 16", "one of [1, 2, 4, 8] would fit")
    refused.told(2, "parallel.ep = 3: must divide model.moe.num_experts = 4")
    refused.told(2, "data.seq_len = 999999: one sample needs 1,000,000 tokens, the train split has")
    refused.told(
        2, "model.vocab_size = 12: must hold the tokenizer's", f'init.from = "{tmp_path / "none"}": there is no'
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("learning_rate.peak=-1", "learning_rate.peak = -1: must be above 0"),
        ("learning_rate.peak=nan", "must be a finite number"),
        ("train.steps=0", "must be at least 1"),
        ("run.timeout_seconds=99999999999999", "must be at most 2592000"),
        ("train.threads=100000", "must be at most 1024"),
        ("run.name=../../x", "does not have the form"),
        ("data.seq_len=1000000000", "one sample needs 1,000,000,001 tokens, the train split has"),
    ],
)
def test_a_number_that_no_run_can_have_is_told_with_its_bound(tmp_path: Path, override: str, rule: str) -> None:
    run("train", write_run_file(tmp_path), override).told(2, rule)


def test_a_corpus_that_is_empty_or_no_utf_8_is_told_and_no_store_appears(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 50)
    out = tmp_path / "out"
    run("prepare", tmp_path / "empty.txt", "--out", out).told(2, "the corpus is empty", "nothing was written")
    refused = run("prepare", tmp_path / "latin.txt", "--out", out)
    refused.told(2, "latin.txt is not UTF-8: byte 0xe9 at offset 3", "iconv -f latin1 -t utf-8")
    run("prepare", tmp_path / "none*.txt", "--out", out).told(2, "none*.txt: no file matches")
    assert not out.exists()


def test_a_shard_cut_short_is_told_before_training_begins(tmp_path: Path, store: Path) -> None:
    spoil(store / "train" / "tokens" / "c" / "0", cut=9)
    before = content_of(store)
    refused = run("train", write_run_file(tmp_path), f"data.store={store}")
    refused.told(2, "train/tokens/c/0 has", "bytes, written were", "restore the file from a good copy, or")
    assert content_of(store) == before
    assert not (tmp_path / "run").exists()


def test_a_flipped_byte_is_told_with_its_file_and_chunk(tmp_path: Path, store: Path) -> None:
    spoil(store / "train" / "tokens" / "c" / "0", flip=100)
    refused = run("train", write_run_file(tmp_path), f"data.store={store}")
    refused.told(2, "train/tokens/c/0 is damaged: chunk 0", "has crc32c", "restore the file from a good copy")
    spoil(store / "train" / "tokens" / "c" / "0", flip=100)
    run("train", write_run_file(tmp_path), f"data.store={store}").told(0)


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path: Path, copy: Path, store: Path) -> None:
    before = content_of(copy / "run")
    run_file = write_run_file(tmp_path)
    smaller = run("train", run_file, "model.vocab_size=256", f"run.folder={tmp_path / 'new'}")
    smaller.told(
        2, "model.vocab_size = 256: must hold the tokenizer's 300 tokens; 320 or 0 (the tokenizer's size) would fit"
    )
    other = tmp_path / "other"
    text = str(tiny_store().parent / "*.txt")
    run("prepare", text, "--vocab-size", 280, "--validation-fraction", 0.2, "--out", other).told(0)
    run("train", run_file, f"data.store={other}", "--allow-change", "data.store").told(2, "holds other tokens than")
    (store / "tokenizer.json").write_bytes((other / "tokenizer.json").read_bytes())
    run("train", run_file, f"data.store={store}").told(2, "is not the tokenizer that wrote these tokens: its sha256")
    assert content_of(copy / "run") == before | {"lock": (copy / "run" / "lock").read_bytes()}


def test_a_checkpoint_cut_short_is_passed_over_and_without_a_whole_one_nothing_is_touched(
    copy: Path, trained: Path
) -> None:
    checkpoints = copy / "run" / "checkpoints"
    spoil(checkpoints / "step_00000006" / "rank_00000.bin", cut=10)
    again = run("train", write_run_file(copy))
    again.told(0, "passed over", "step_00000006/rank_00000.bin has", "resumed at step 3")
    assert checkpoint_bytes(copy, 6) == checkpoint_bytes(trained, 6)
    for step in (3, 6):
        spoil(checkpoints / f"step_{step:08}" / "rank_00000.bin", cut=10)
    before = content_of(checkpoints)
    refused = run("train", write_run_file(copy))
    refused.told(2, "step_00000006", "step_00000003", "no checkpoint is whole: restore one from a copy, or move them")
    assert content_of(checkpoints) == before


def test_a_checkpoint_of_another_model_is_refused_by_its_keys(copy: Path) -> None:
    before = content_of(copy / "run" / "checkpoints")
    refused = run("train", write_run_file(copy), "model.hidden_size=32", "run.seed=1")
    refused.told(2, "step_00000006: ", "model.hidden_size = 32: the checkpoint has 16", "run.seed = 1: ")
    assert "optimizer" not in refused.err  # the keys that differ, not every tensor that differs by them
    assert content_of(copy / "run" / "checkpoints") == before


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loss_that_is_no_number_names_step_documents_and_checkpoint_once(tmp_path: Path, ranks: int) -> None:
    command = ("train", write_run_file(tmp_path), "zero.stage=0")
    stopped = run(*command, ranks=ranks, fault=POISON_STEP_5)
    stopped.told(1, "meshwright: step 5: loss = nan", ".txt (document ", "lower learning_rate.peak")
    stopped.told(1, f"the last good checkpoint is {tmp_path / 'run' / 'checkpoints' / 'step_00000003'}")
    assert stopped.err.count("loss = nan") == 1
    # A run that was resumed, and ends before it has saved, goes back to where it was resumed.
    again = run(*command, ranks=ranks, fault=POISON_STEP_5)
    again.told(1, "resumed at step 3", "the last good checkpoint is", "step_00000003")
    run(*command, ranks=ranks).told(0, "resumed at step 3")
    assert numbers(tmp_path, "step") == [1, 2, 3, 4, 5, 6]


def test_a_port_in_use_is_told_before_any_rank_starts(tmp_path: Path) -> None:
    run_file = write_run_file(tmp_path)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        refused = launch("train", run_file, "--ranks", 2, environment={"MASTER_PORT": port}).wait()
        refused.told(2, f"MASTER_PORT = {port}: port {port} cannot be had (Address already in use)")
        found = run("train", run_file, "run.timeout_seconds=3", ranks=2, environment={"MASTER_PORT": port})
        found.told(1, f"rank 0: port {port} is in use", "set MASTER_PORT to a free one on every node")
        found.told(1, "rank 1 of 2 found nobody", "something listens there and does not answer")
        assert found.seconds < 30
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_to_is_told_before_training(tmp_path: Path) -> None:
    run_file = write_run_file(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    # Also for root, who may write anywhere else: the system's own folder.
    refused = run("train", run_file, "run.folder=/proc/none", ranks=2)
    refused.told(2, "run.folder = /proc/none: 1 problem", "cannot be written to", "give another run.folder")
    assert refused.err.count("cannot be written to") == 1
    # What can be seen without writing is told with the run file's other mistakes.
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        refused = run("train", run_file, f"run.folder={folder}", "train.steps=0")
        refused.told(2, "run.folder = ", f"{tmp_path / 'file'} is there and is no folder", "train.steps = 0: must be")
    run("train", run_file, f"run.folder={tmp_path / 'loop' / 'x'}").told(2, "cannot be looked at: Too many levels")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_store_that_cannot_be_read_is_told(tmp_path: Path, store: Path) -> None:
    run_file = write_run_file(tmp_path)
    (store / "meta.json").unlink()
    run("train", run_file, f"data.store={store}").told(2, "is no token store: it has no meta.json")
    (store / "meta.json").symlink_to(store / "meta.json")
    run("train", run_file, f"data.store={store}").told(2, "Too many levels of symbolic links", "meta.json")
    assert not (tmp_path / "run").exists()


def test_a_clock_that_goes_backwards_changes_nothing_that_is_learned(tmp_path: Path, trained: Path) -> None:
    backwards = "import time\nbegan = time.time()\ntime.time = lambda: 2 * began - time.perf_counter() * 3600"
    run("train", write_run_file(tmp_path), fault=backwards).told(0)
    assert numbers(tmp_path, "loss") == pytest.approx(numbers(trained, "loss"), rel=1e-5)
    run("train", write_run_file(tmp_path), "train.steps=7", fault=backwards).told(0, "resumed at step 6")
    assert numbers(tmp_path, "step") == [1, 2, 3, 4, 5, 6, 7]
