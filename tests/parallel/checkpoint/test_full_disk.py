"""A disk that fills up while saving: one clear error on every rank, nothing left of the save, nothing else lost."""

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import names_in
from rank_pool import run_mesh

from meshwright.parallel.checkpoint.agree import CheckpointError
from meshwright.parallel.checkpoint.describe import describe
from meshwright.parallel.checkpoint.save import AsyncSaver, save_checkpoint
from meshwright.parallel.checkpoint.verify import verify
from meshwright.parallel.mesh import Mesh, Sizes, single_process_mesh
from meshwright.parallel.placement import Placement, Split

NO_SPACE = "[Errno 28] No space left on device"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB; only root may mount one."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("no file system can be mounted here; the test beside it fills the disk by a failing write")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_disk_that_is_really_full_leaves_the_checkpoint_before(small_disk: Path) -> None:
    mesh = single_process_mesh()
    path = save_checkpoint(small_disk, 1, {"a": torch.ones(10_000)}, {}, mesh, "model")
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(small_disk, 2, {"a": torch.ones(100_000)}, {}, mesh, "model")
    text = str(caught.value)
    assert text.startswith("the checkpoint of step 2 was not saved (earlier ones are untouched): OSError: " + NO_SPACE)
    assert "rank_00000.bin" in text
    assert names_in(small_disk) == ["step_00000001"]
    assert verify(path, mesh) == []
    save_checkpoint(small_disk, 3, {"a": torch.ones(10_000)}, {}, mesh, "model")


def fill_disk_of_rank_1(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if mesh.rank == 1:
        monkeypatch.setattr(os, "write", full)


def save_while_rank_1_is_full(mesh: Mesh, folder: Path, in_background: bool) -> tuple[str, float]:
    placement = Placement(splits=(Split(0, mesh.dp_shard),))
    tensors = {"a": describe(torch.ones(500), (1000,), placement, mesh, zero_part=False)}
    save_checkpoint(folder, 1, tensors, {}, mesh, "model")
    text, began = "", time.monotonic()
    with pytest.MonkeyPatch.context() as monkeypatch:
        fill_disk_of_rank_1(mesh, monkeypatch)
        try:
            if in_background:
                saver = AsyncSaver(mesh)
                saver.save(folder, 2, tensors, {}, "model")
                saver.close()
            else:
                save_checkpoint(folder, 2, tensors, {}, mesh, "model")
        except CheckpointError as error:
            text = str(error)
    took = time.monotonic() - began
    save_checkpoint(folder, 3, tensors, {}, mesh, "model")  # the ranks are still in step with each other
    return text, took


@pytest.mark.parametrize("in_background", [False, True], ids=["at once", "in the background"])
def test_one_full_disk_is_one_error_on_every_rank(tmp_path: Path, in_background: bool) -> None:
    answers = run_mesh(Sizes(dp_shard=2), save_while_rank_1_is_full, tmp_path, in_background)
    assert answers[0][0] == answers[1][0]
    assert f"step 2 was not saved (earlier ones are untouched): rank 1: OSError: {NO_SPACE}" in answers[0][0]
    assert max(took for _, took in answers) < 20
    assert names_in(tmp_path) == ["step_00000001", "step_00000003"]
