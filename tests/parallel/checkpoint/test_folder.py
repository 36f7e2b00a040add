"""The folder of checkpoints: which stay, which leftovers go, and that nothing else is touched."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_cases import names_in

from meshwright.parallel.checkpoint.agree import CheckpointError
from meshwright.parallel.checkpoint.folder import Keep, list_checkpoints, read_manifest, retain
from meshwright.parallel.checkpoint.load import load_checkpoint
from meshwright.parallel.checkpoint.save import save_checkpoint
from meshwright.parallel.checkpoint.verify import newest_that_verifies, verify
from meshwright.parallel.mesh import single_process_mesh


def save(
    folder: Path,
    step: int,
    keep: Keep | None = None,
    value: float = 0.0,
    tell: Callable[[str], None] | None = None,
) -> Path:
    tensors = {"weight": torch.full((4,), value or float(step))}
    return save_checkpoint(folder, step, tensors, {}, single_process_mesh(), "model", keep, tell)


def test_the_last_n_and_every_kth_stay(tmp_path: Path) -> None:
    for step in range(10, 100, 10):
        save(tmp_path, step, Keep(last=2, every=40))
    assert list_checkpoints(tmp_path) == [40, 80, 90]


def test_checkpoints_of_a_future_that_was_left_do_not_count_as_newest(tmp_path: Path) -> None:
    for step in (10, 20, 90):
        save(tmp_path, step)
    (tmp_path / "step_00000090" / "manifest.json").unlink()  # damaged: training went back to 20
    save(tmp_path, 30, Keep(last=1))
    assert list_checkpoints(tmp_path) == [30, 90]
    assert newest_that_verifies(tmp_path, single_process_mesh()).step == 30


def test_a_checkpoint_that_was_passed_over_does_not_take_the_place_of_a_whole_one(tmp_path: Path) -> None:
    for step in (10, 13, 20):
        save(tmp_path, step, Keep(last=2, passed_over=frozenset({13})))
    assert list_checkpoints(tmp_path) == [10, 13, 20]
    save(tmp_path, 30, Keep(last=2, passed_over=frozenset({13})))
    assert list_checkpoints(tmp_path) == [13, 20, 30]


@pytest.mark.parametrize("keep", [Keep(last=0), Keep(last=1, every=-1)])
def test_keeping_none_is_refused(tmp_path: Path, keep: Keep) -> None:
    with pytest.raises(ValueError, match="keep at least the last 1"):
        retain(tmp_path, 1, keep)
    with pytest.raises(CheckpointError, match="keep at least the last 1"):
        save(tmp_path, 1, keep)
    assert list_checkpoints(tmp_path) == [1]


def test_a_link_to_a_checkpoint_is_removed_and_what_it_points_to_stays(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    save(folder, 1).rename(elsewhere)
    (folder / "step_00000001").symlink_to(elsewhere)
    save(folder, 2, Keep(last=1))
    assert names_in(folder) == ["step_00000002"]
    assert names_in(elsewhere) != []


def test_an_old_checkpoint_that_cannot_be_removed_is_told_and_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)  # as where a network file system is busy
    told: list[str] = []
    for step in (2, 3):  # nor does what is left end the next save
        save(tmp_path, step, Keep(last=1), tell=told.append)
    assert list_checkpoints(tmp_path) == [3]
    assert "step_00000001 could not be removed, and what is left of it is" in told[0]
    assert len(told) == 2


@pytest.mark.parametrize("name", ["step_000000001", "step_0000000001", "step_00000001x"])
def test_a_folder_of_a_similar_name_is_not_counted(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    for step in (1, 2, 3):
        save(tmp_path, step, Keep(last=2))
    assert list_checkpoints(tmp_path) == [2, 3]
    assert (tmp_path / name).is_dir()


def test_a_file_of_a_checkpoints_name_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "step_00000002").write_text("not ours")
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"step_00000002 is in the way: it is no folder; move it away"):
        save(tmp_path, 2)
    assert names_in(tmp_path) == ["step_00000001", "step_00000002"]
    assert (tmp_path / "step_00000002").read_text() == "not ours"


def test_a_manifest_that_is_too_deep_is_damage_like_any_other(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "manifest.json").write_text("[" * 100_000)
    newest = newest_that_verifies(tmp_path, single_process_mesh())
    assert newest.step == 1
    assert "manifest.json is damaged" in next(iter(newest.passed_over.values()))[0]


def test_only_leftovers_of_our_own_form_are_removed(tmp_path: Path) -> None:
    ours = ["step_00000007.tmp-0123abcd", "step_00000007.old-0123abcd"]
    others = ["step_00000007.tmp-mine", "step_7", "notes", "step_00000007.tmp-0123abcd.bak"]
    for name in ours + others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / "step_00000009.tmp-0123abcd").write_text("a file, not a folder")
    save(tmp_path, 7)
    save(tmp_path, 8)
    assert names_in(tmp_path) == sorted([*others, "step_00000007", "step_00000008", "step_00000009.tmp-0123abcd"])


def test_a_step_that_exists_is_replaced_whole(tmp_path: Path) -> None:
    save(tmp_path, 5, value=1.0)
    path = save(tmp_path, 5, value=2.0)
    weight = torch.zeros(4)
    load_checkpoint(path, {"weight": weight}, single_process_mesh())
    assert weight.tolist() == [2.0] * 4
    assert names_in(tmp_path) == ["step_00000005"]


def test_a_checkpoint_moved_aside_by_a_killed_save_gets_its_name_back(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    path.rename(tmp_path / "step_00000005.old-0123abcd")
    assert list_checkpoints(tmp_path) == []
    assert newest_that_verifies(tmp_path, single_process_mesh()).path == path


def test_a_save_gives_the_name_back_too_instead_of_clearing_it_away(tmp_path: Path) -> None:
    save(tmp_path, 5).rename(tmp_path / "step_00000005.old-0123abcd")
    save(tmp_path, 6)
    assert list_checkpoints(tmp_path) == [5, 6]


def test_a_copy_under_any_other_name_still_loads(tmp_path: Path) -> None:
    mesh = single_process_mesh()
    path = save(tmp_path, 5).rename(tmp_path / "best")
    assert verify(path, mesh) == []
    weight = torch.zeros(4)
    load_checkpoint(path, {"weight": weight}, mesh)
    assert weight.tolist() == [5.0] * 4
    manifest = read_manifest(path)
    assert (manifest.step, manifest.world_size, manifest.fingerprint) == (5, 1, "model")


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"step 1 was not saved .*: (NotADirectory|FileExists)Error"):
        save(tmp_path / "file", 1)


def test_every_file_and_folder_is_on_the_disk_before_anything_refers_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noting_fsync(fd: int) -> None:
        happened.append("fsync " + Path(os.readlink(f"/proc/self/fd/{fd}")).name.split(".tmp-")[0])
        fsync(fd)

    def noting_rename(source: Path, target: Path) -> None:
        happened.append(f"rename {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "rename", noting_rename)
    save(tmp_path, 1)
    files = ["rank_00000.bin", "tensors.json", "state.json", "manifest.json"]
    last = ["fsync step_00000001", "rename step_00000001", f"fsync {tmp_path.name}"]
    assert happened == [f"fsync {file}" for file in files] + last
