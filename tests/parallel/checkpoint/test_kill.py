"""kill -9 at any moment of a save leaves a checkpoint that loads: tried before every single call to the disk."""

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import names_in
from rank_pool import RankFailed, run_mesh

from meshwright.parallel.checkpoint.describe import describe
from meshwright.parallel.checkpoint.folder import Keep, checkpoint_path, list_checkpoints
from meshwright.parallel.checkpoint.load import load_checkpoint
from meshwright.parallel.checkpoint.save import save_checkpoint
from meshwright.parallel.checkpoint.verify import newest_that_verifies, verify
from meshwright.parallel.mesh import Mesh, Sizes, single_process_mesh
from meshwright.parallel.placement import Placement, Split

CALLS = ("mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir")
DONE = 7


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of saves, and no disk to wait for."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def die_before_call(number: int) -> None:
    """Let this process kill itself before its `number`-th call to the disk; a write is first half done."""
    left = number

    def dying(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                if name == "write":
                    call(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counted

    for name in CALLS:
        setattr(os, name, dying(getattr(os, name), name))


def save(folder: Path, step: int, value: float, keep: Keep | None) -> None:
    tensors = {"a": torch.full((1000,), value), "b": torch.full((10,), value)}
    save_checkpoint(folder, step, tensors, {"value": value}, single_process_mesh(), "model", keep)


def save_and_die(number: int, folder: Path, step: int, keep: Keep | None) -> None:
    die_before_call(number)
    save(folder, step, 2.0, keep)
    os._exit(DONE)


def loaded_value(folder: Path) -> float:
    """Load the newest checkpoint and see that it is all of one save."""
    mesh = single_process_mesh()
    newest = newest_that_verifies(folder, mesh)
    assert newest.path is not None
    assert all(verify(checkpoint_path(folder, step), mesh) == [] for step in list_checkpoints(folder))
    tensors = {"a": torch.zeros(1000), "b": torch.zeros(10)}
    value = load_checkpoint(newest.path, tensors, mesh)["value"]
    assert all(bool((tensor == value).all()) for tensor in tensors.values())
    return float(value)


@pytest.mark.parametrize(
    ("step", "keep"), [(2, None), (2, Keep(last=1)), (1, None)], ids=["next step", "old one removed", "same step"]
)
def test_a_kill_before_any_call_to_the_disk_leaves_a_checkpoint(memory: Path, step: int, keep: Keep | None) -> None:
    context = multiprocessing.get_context("fork")
    found = []
    for number in range(200):
        folder = memory / str(number)
        save(folder, 1, 1.0, None)
        process = context.Process(target=save_and_die, args=(number, folder, step, keep))
        process.start()
        process.join()
        assert process.exitcode in (DONE, -signal.SIGKILL)
        found.append(loaded_value(folder))
        save(folder, 3, 3.0, Keep(last=1))  # the next save works, and clears what the kill left
        assert names_in(folder) == ["step_00000003"]
        assert loaded_value(folder) == 3.0
        if process.exitcode == DONE:
            break
    assert process.exitcode == DONE
    assert len(found) > 15
    assert found == sorted(found)  # the old one up to the rename, the new one from then on
    assert {1.0, 2.0} == set(found)


def save_on_two_ranks(mesh: Mesh, folder: Path, number: int) -> None:
    placement = Placement(splits=(Split(0, mesh.dp_shard),))
    for step in (1, 2):
        part = describe(torch.full((500,), float(step)), (1000,), placement, mesh, zero_part=False)
        if step == 2 and mesh.rank == 1:
            die_before_call(number)
        save_checkpoint(folder, step, {"a": part}, {}, mesh, "model")


@pytest.mark.parametrize("number", [0, 1, 2], ids=["before its file", "in its file", "before its fsync"])
def test_a_killed_rank_ends_the_others_and_leaves_the_checkpoint_before(tmp_path: Path, number: int) -> None:
    with pytest.raises(RankFailed, match=r"rank 0 of 2[\s\S]*rank 1 of 2\nthe process died"):
        run_mesh(Sizes(dp_shard=2), save_on_two_ranks, tmp_path, number)
    assert list_checkpoints(tmp_path) == [1]
    tensors = {"a": torch.zeros(1000)}
    load_checkpoint(tmp_path / "step_00000001", tensors, single_process_mesh())
    assert bool((tensors["a"] == 1.0).all())
