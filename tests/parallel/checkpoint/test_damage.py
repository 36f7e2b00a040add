"""A damaged checkpoint is named and passed over, by all ranks alike; nothing of it reaches a tensor."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rank_pool import run_mesh

from meshwright.parallel.checkpoint.agree import CheckpointError
from meshwright.parallel.checkpoint.durable import FileSeal, hash_file
from meshwright.parallel.checkpoint.load import Expect, load_checkpoint, read_state, saved_tensors
from meshwright.parallel.checkpoint.save import save_checkpoint
from meshwright.parallel.checkpoint.verify import newest_that_verifies, verify
from meshwright.parallel.mesh import Mesh, Sizes, single_process_mesh


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(bytes(data))


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES: list[tuple[str, Callable[[Path], None], str]] = [
    ("a flipped bit in the tensors", lambda p: flip_a_bit(p / "rank_00000.bin"), "rank_00000.bin was changed"),
    ("a flipped bit in the table", lambda p: flip_a_bit(p / "tensors.json"), "tensors.json was changed"),
    ("a flipped bit in the state", lambda p: flip_a_bit(p / "state.json"), "state.json was changed"),
    ("a flipped bit in the manifest", lambda p: flip_a_bit(p / "manifest.json"), "manifest.json"),
    (
        "tensors cut short",
        lambda p: cut_short(p / "rank_00000.bin"),
        "rank_00000.bin has 4095 bytes, 4096 were written",
    ),
    ("a manifest cut short", lambda p: (p / "manifest.json").write_text("{"), "manifest.json is damaged"),
    ("an empty manifest", lambda p: (p / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    ("a manifest of nothing", lambda p: (p / "manifest.json").write_text("{}"), "it has no entry 'manifest'"),
    ("tensors missing", lambda p: (p / "rank_00000.bin").unlink(), "rank_00000.bin is missing"),
    ("the manifest missing", lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    (
        "the state of another step",
        lambda p: shutil.copy(p.with_name("step_00000001") / "state.json", p / "state.json"),
        "state.json was changed",
    ),
    (
        "a rank's file of a larger run beside",
        lambda p: shutil.copy(p / "rank_00000.bin", p / "rank_00007.bin"),
        "rank_00007.bin is not of this checkpoint",
    ),
    (
        "the manifest of another step",
        lambda p: shutil.copy(p.with_name("step_00000001") / "manifest.json", p / "manifest.json"),
        "is of step 1, the folder's name says another",
    ),
]


@pytest.mark.parametrize(("damage", "said"), [case[1:] for case in DAMAGES], ids=[case[0] for case in DAMAGES])
def test_damage_is_named_and_the_checkpoint_before_is_taken(
    tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    mesh = single_process_mesh()
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"weight": torch.full((1024,), float(step))}, {"step": step}, mesh, "model")
    path = tmp_path / "step_00000002"
    assert verify(path, mesh) == []
    damage(path)

    problems = verify(path, mesh)
    assert len(problems) == 1
    assert said in problems[0]
    assert str(path) in problems[0]

    weight = torch.zeros(1024)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(path, {"weight": weight}, mesh)
    assert not weight.any()

    newest = newest_that_verifies(tmp_path, mesh)
    assert (newest.step, newest.path, newest.passed_over) == (1, tmp_path / "step_00000001", {path: problems})


def test_a_file_cut_short_after_verifying_is_an_error_of_the_reader(tmp_path: Path) -> None:
    mesh = single_process_mesh()
    path = save_checkpoint(tmp_path, 1, {"weight": torch.ones(1024)}, {}, mesh, "model")
    cut_short(path / "rank_00000.bin")
    with pytest.raises(CheckpointError, match=r"rank_00000\.bin is cut short: 4095 bytes, the table needs 4096"):
        load_checkpoint(path, {"weight": torch.zeros(1024)}, mesh, Expect(is_verified=True))


def test_small_files_are_checked_also_when_read_alone(tmp_path: Path) -> None:
    mesh = single_process_mesh()
    path = save_checkpoint(tmp_path, 1, {"weight": torch.ones(4)}, {"a": 1}, mesh, "model")
    flip_a_bit(path / "state.json")
    flip_a_bit(path / "tensors.json")
    with pytest.raises(CheckpointError, match="was changed"):
        read_state(path, mesh)
    with pytest.raises(ValueError, match=r"tensors\.json was changed"):
        saved_tensors(path)


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path: Path) -> None:
    mesh = single_process_mesh()
    assert newest_that_verifies(tmp_path, mesh).path is None
    assert newest_that_verifies(tmp_path / "nothing", mesh).path is None
    with pytest.raises(CheckpointError, match="nothing is no folder"):
        load_checkpoint(tmp_path / "nothing", {}, mesh)


def newest_on_every_rank(mesh: Mesh, folder: Path) -> tuple[int, list[str]]:
    newest = newest_that_verifies(folder, mesh)
    return newest.step, [problem for problems in newest.passed_over.values() for problem in problems]


def test_all_ranks_fall_back_to_the_same_checkpoint_though_one_rank_saw_the_damage(tmp_path: Path) -> None:
    mesh = single_process_mesh()
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"weight": torch.full((1024,), float(step))}, {}, mesh, "model")
    flip_a_bit(tmp_path / "step_00000003" / "rank_00000.bin")
    (tmp_path / "step_00000002" / "manifest.json").unlink()
    answers = run_mesh(Sizes(dp_shard=3), newest_on_every_rank, tmp_path)
    assert answers[0] == answers[1] == answers[2]
    step, problems = answers[0]
    assert step == 1
    assert [text.rsplit("/", 1)[1].split()[0] for text in problems] == ["rank_00000.bin", "manifest.json"]


def files_hashed_by_this_rank(mesh: Mesh, folder: Path) -> list[str]:
    read: list[str] = []

    def noting(path: Path) -> FileSeal:
        read.append(path.name)
        return hash_file(path)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("meshwright.parallel.checkpoint.verify.hash_file", noting)
        assert verify(folder, mesh) == []
    return read


def test_each_file_is_verified_by_exactly_one_rank(tmp_path: Path) -> None:
    tensors = {"weight": torch.ones(1024)}
    path = save_checkpoint(tmp_path, 1, tensors, {}, single_process_mesh(), "model")
    read = run_mesh(Sizes(dp_shard=3), files_hashed_by_this_rank, path)
    assert sorted(name for names in read for name in names) == ["rank_00000.bin", "state.json", "tensors.json"]
    assert max(len(names) for names in read) == 1
