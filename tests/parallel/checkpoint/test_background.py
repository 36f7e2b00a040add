"""A save in the background holds what was there when it was asked for, and its errors are not lost."""

import os
import threading
from pathlib import Path

import pytest
import torch
from checkpoint_cases import assert_holds, held_state, names_in
from rank_pool import run_mesh

from meshwright.parallel.checkpoint.agree import CheckpointError
from meshwright.parallel.checkpoint.folder import Keep, list_checkpoints
from meshwright.parallel.checkpoint.load import load_checkpoint
from meshwright.parallel.checkpoint.save import AsyncSaver, save_checkpoint
from meshwright.parallel.mesh import Mesh, Sizes, single_process_mesh


def hold_writes(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let no byte reach the disk before the event is set."""
    go_on, write = threading.Event(), os.write

    def waiting(fd: int, data: bytes) -> int:
        if threading.current_thread() is not threading.main_thread():
            assert go_on.wait(30)
        return write(fd, data)

    monkeypatch.setattr(os, "write", waiting)
    return go_on


def is_saving(saver: AsyncSaver) -> bool:
    """Say whether a save is under way on this rank."""
    return saver._thread is not None and saver._thread.is_alive()


def change_weights_after_the_return(mesh: Mesh, folder: Path) -> list[int]:
    parts = held_state(mesh, zero=True)
    with pytest.MonkeyPatch.context() as monkeypatch, AsyncSaver(mesh) as saver:
        go_on = hold_writes(monkeypatch)
        saver.save(folder, 1, parts, {"step": 1}, "model")
        before = list_checkpoints(folder)
        assert is_saving(saver)
        for part in parts.values():
            part.tensor.zero_()
        go_on.set()
        assert saver.wait() == folder / "step_00000001"
        assert not is_saving(saver)
    loaded = held_state(mesh, zero=True, blank=True)
    assert load_checkpoint(folder / "step_00000001", loaded, mesh) == {"step": 1}
    assert_holds(loaded, mesh, zero=True)
    return before


@pytest.mark.parametrize("sizes", [Sizes(dp_shard=2), Sizes(dp_shard=4, ep=2)], ids=["2", "4, ep 2"])
def test_weights_changed_right_after_the_return_are_saved_as_they_were(tmp_path: Path, sizes: Sizes) -> None:
    assert run_mesh(sizes, change_weights_after_the_return, tmp_path) == [[]] * sizes.world


def test_what_is_written_late_is_on_no_disk_before_it_is_waited_for(tmp_path: Path) -> None:
    weight, mesh = torch.ones(8), single_process_mesh()
    with AsyncSaver(mesh, writes_late=True) as saver:
        for step in (1, 2, 3):
            weight.fill_(step)
            saver.save(tmp_path, step, {"weight": weight}, {}, "model", Keep(last=3))
            assert list_checkpoints(tmp_path) == list(range(1, step))
        weight.zero_()
        assert saver.wait() == tmp_path / "step_00000003"
        assert saver.wait() is None
    load_checkpoint(tmp_path / "step_00000003", {"weight": weight}, mesh)
    assert weight.tolist() == [3.0] * 8


def test_it_works_in_one_process_and_one_save_waits_for_the_other(tmp_path: Path) -> None:
    weight = torch.zeros(8)
    mesh = single_process_mesh()
    with AsyncSaver(mesh) as saver:
        assert saver.wait() is None
        for step in (1, 2, 3):
            weight.fill_(step)
            saver.save(tmp_path, step, {"weight": weight}, {}, "model", Keep(last=2))
            assert step == 1 or step - 1 in list_checkpoints(tmp_path)  # the save before it is finished
    assert list_checkpoints(tmp_path) == [2, 3]
    load_checkpoint(tmp_path / "step_00000002", {"weight": weight}, mesh)
    assert weight.tolist() == [2.0] * 8


def test_an_error_is_raised_by_the_next_save_and_then_forgotten(tmp_path: Path) -> None:
    mesh = single_process_mesh()
    tensors = {"weight": torch.ones(8)}
    saver = AsyncSaver(mesh)
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    saver.save(blocked, 1, tensors, {}, "model")
    with pytest.raises(CheckpointError, match="step 1 was not saved"):
        saver.save(tmp_path / "folder", 2, tensors, {}, "model")
    saver.save(tmp_path / "folder", 3, tensors, {}, "model")
    saver.close()
    saver.close()
    assert names_in(tmp_path / "folder") == ["step_00000003"]


def test_a_mistake_of_the_caller_is_raised_at_once(tmp_path: Path) -> None:
    with AsyncSaver(single_process_mesh()) as saver, pytest.raises(CheckpointError, match="is a tuple"):
        saver.save(tmp_path, 1, {}, {"a": ()}, "model")


def test_a_save_meanwhile_does_not_take_the_one_under_way_for_a_leftover(tmp_path: Path) -> None:
    mesh = single_process_mesh()
    tensors = {"weight": torch.ones(8)}
    with pytest.MonkeyPatch.context() as monkeypatch, AsyncSaver(mesh) as saver:
        go_on = hold_writes(monkeypatch)
        saver.save(tmp_path, 1, tensors, {}, "model")
        while not list(tmp_path.glob("*.tmp-*")):
            assert is_saving(saver)
        save_checkpoint(tmp_path, 2, tensors, {}, mesh, "model")
        go_on.set()
    assert names_in(tmp_path) == ["step_00000001", "step_00000002"]
