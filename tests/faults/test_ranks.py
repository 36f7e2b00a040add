"""What can befall one rank of two, in real runs: all end within seconds, one message names it, nothing is lost."""

import signal
from pathlib import Path

import pytest
from faults.real_command import launch, run, start
from tiny_run import checkpoint_bytes, numbers, tiny_store, write_run_file

COMMAND = ("parallel.ep=2", "checkpoint.keep_last=9")
# Rank 1's part of the checkpoint of step 6 meets a full disk.
FULL_DISK = """
import errno, os
write = os.write
def full(fd, data):
    if rank == 1 and "step_00000006" in os.readlink(f"/proc/self/fd/{fd}"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write(fd, data)
os.write = full
"""
# Rank 1 is killed when half of its part of the checkpoint of step 6 is written.
KILLED_IN_SAVE = """
import os, signal
write = os.write
def half(fd, data):
    if rank == 1 and "step_00000006" in os.readlink(f"/proc/self/fd/{fd}"):
        write(fd, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return write(fd, data)
os.write = half
"""
# Rank 1 does something to itself before step 5's forward pass, while rank 0 goes into it.
IN_STEP_5 = """
import os, shutil, signal
from meshwright.launcher.training import one_step
before = one_step.forward_backward
def forward_backward(run, inputs, step, *args):
    if step == 4 and rank == 1:
        {what}
    return before(run, inputs, step, *args)
one_step.forward_backward = forward_backward
"""
SIGNAL_ITSELF = IN_STEP_5.format(what="os.kill(os.getpid(), signal.{name})")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing befell."""
    folder = tmp_path_factory.mktemp("unbroken")
    run("train", write_run_file(folder), *COMMAND, ranks=2).told(0)
    return folder


def goes_on_bitwise(folder: Path, unbroken: Path, step: int) -> None:
    """Assert that the next start resumes at `step` and ends as the run that nothing befell."""
    assert sorted(path.name for path in (folder / "run" / "checkpoints").glob("step_????????")) == [f"step_{step:08}"]
    run("train", write_run_file(folder), *COMMAND, ranks=2).told(0, f"resumed at step {step}")
    assert numbers(folder, "step") == [1, 2, 3, 4, 5, 6]
    assert numbers(folder, "loss") == numbers(unbroken, "loss")
    assert checkpoint_bytes(folder, 6) == checkpoint_bytes(unbroken, 6)
    assert not list((folder / "run" / "checkpoints").glob("*.tmp-*"))


def test_a_full_disk_of_one_rank_is_one_error_and_the_older_checkpoint_resumes(tmp_path: Path, unbroken: Path) -> None:
    done = launch("train", write_run_file(tmp_path), *COMMAND, "--ranks", 2, fault=FULL_DISK).wait()
    done.told(
        1, "the checkpoint of step 6 was not saved (earlier ones are untouched): rank 1: OSError: [Errno 28] No space"
    )
    assert done.err.count("No space left on device") == 1
    assert done.err.count("meshwright: ") == 1
    goes_on_bitwise(tmp_path, unbroken, 3)


def test_a_full_disk_under_the_metrics_is_told_by_its_file(tmp_path: Path) -> None:
    fault = (
        "from meshwright.launcher.observe import sinks\n"
        "opened = sinks.JsonLines.__init__\n"
        "def full_file(self, *args):\n"
        "    opened(self, *args)\n"
        "    self._file.close()\n"
        "    self._file = open('/dev/full', 'a', buffering=1)\n"
        "sinks.JsonLines.__init__ = full_file\n"
    )
    done = run("train", write_run_file(tmp_path), fault=fault)
    done.told(1, "cannot append to the run's metrics: No space left on device", "metrics.jsonl")


def test_kill_9_in_the_middle_of_a_save_loses_nothing(tmp_path: Path, unbroken: Path) -> None:
    done = launch("train", write_run_file(tmp_path), *COMMAND, "--ranks", 2, fault=KILLED_IN_SAVE).wait()
    done.told(1, "meshwright: rank 1 of 2 was killed by SIGKILL")
    assert "rank 0" not in done.err
    assert list((tmp_path / "run" / "checkpoints").glob("step_00000006.tmp-*"))
    goes_on_bitwise(tmp_path, unbroken, 3)


def test_a_rank_that_dies_in_a_step_is_named_and_the_others_end_within_seconds(tmp_path: Path, unbroken: Path) -> None:
    # Ranks under another launcher: nobody ends rank 0, it finds out by itself.
    running = start("train", write_run_file(tmp_path), *COMMAND, ranks=2, fault=SIGNAL_ITSELF.format(name="SIGKILL"))
    running.wait_for("step 4 |")
    done = running.wait()
    done.told(1, "meshwright: rank 0: another rank ended or was cut off; what that rank says first is the cause")
    assert done.seconds < 30
    goes_on_bitwise(tmp_path, unbroken, 3)


def test_a_flipped_byte_that_one_rank_meets_is_told_with_its_rank_file_and_chunk(tmp_path: Path) -> None:
    store_path = tiny_store() / "train" / "tokens"
    fault = (
        "from meshwright.data import fast_read\n"
        "before = fast_read.ShardedArray._check_crc\n"
        "def flipped(self, shard, number, inner):\n"
        "    if rank == 1 and 'train/tokens' in str(shard.path):\n"
        "        content = bytearray(shard.bytes)\n"
        "        content[10] ^= 1\n"
        "        shard.bytes = bytes(content)\n"
        "    before(self, shard, number, inner)\n"
        "fast_read.ShardedArray._check_crc = flipped\n"
    )
    done = run("train", write_run_file(tmp_path), *COMMAND, ranks=2, fault=fault)
    done.told(1, f"meshwright: rank 1: {store_path}/c/0 is damaged: chunk 0 (elements 0 to")
    done.told(1, "meshwright: rank 0: another rank ended or was cut off")
    assert done.seconds < 30


def test_a_rank_that_is_stopped_ends_the_run_after_the_timeout(tmp_path: Path) -> None:
    running = start(
        "train",
        write_run_file(tmp_path),
        *COMMAND,
        "run.timeout_seconds=5",
        ranks=2,
        fault=SIGNAL_ITSELF.format(name="SIGSTOP"),
    )
    running.wait_for("waited longer than run.timeout_seconds for another rank")
    running.send(signal.SIGKILL, rank=1)
    running.wait().told(
        1, "meshwright: rank 0: waited longer", "a rank that did not print this line is the one to look at"
    )


def test_a_checkpoint_folder_that_is_deleted_in_the_run_is_made_anew(tmp_path: Path, unbroken: Path) -> None:
    fault = IN_STEP_5.format(what=f"shutil.rmtree({str(tmp_path / 'run' / 'checkpoints')!r})")
    run("train", write_run_file(tmp_path), *COMMAND, ranks=2, fault=fault).told(0)
    assert checkpoint_bytes(tmp_path, 6) == checkpoint_bytes(unbroken, 6)


@pytest.mark.slow
def test_a_rank_that_dies_under_our_own_parent_is_named_once(tmp_path: Path, unbroken: Path) -> None:
    fault = SIGNAL_ITSELF.format(name="SIGKILL")
    done = launch("train", write_run_file(tmp_path), *COMMAND, "--ranks", 2, fault=fault).wait()
    done.told(1, "meshwright: rank 1 of 2 was killed by SIGKILL (the system does this when memory runs out)")
    assert done.err.count("meshwright: ") == 1
    goes_on_bitwise(tmp_path, unbroken, 3)


@pytest.mark.slow
def test_a_mistake_that_every_rank_finds_is_told_once(tmp_path: Path) -> None:
    done = launch("train", write_run_file(tmp_path), "--ranks", 2, f"data.store={tmp_path / 'none'}").wait()
    done.told(2, "tiny.toml: 1 problem, nothing was started\n  data.store = ")
    assert done.err.count("there is no such folder") == 1
    assert "rank 0" not in done.err
