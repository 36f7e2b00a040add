"""One run at a time in a folder; the lock is gone with its holder, and a file system without locks is no obstacle."""

import errno
import fcntl
import os
import socket
from pathlib import Path

import pytest
from rank_pool import run_mesh

from meshwright.launcher.runfile.messages import ConfigError
from meshwright.launcher.training import run_lock as module
from meshwright.launcher.training.run_lock import run_lock
from meshwright.parallel.mesh import Mesh, Sizes, single_process_mesh


def test_a_second_holder_is_refused_by_name_until_the_first_lets_go(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with run_lock(folder, single_process_mesh()) as told:
        assert told == []
        named = rf"process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(ConfigError, match=named), run_lock(folder, single_process_mesh()):
            pass
    with run_lock(folder, single_process_mesh()):
        pass


def test_a_holder_on_another_host_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_OTHER_HOST_SECONDS", 30.0)
    other = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    os.write(other, b"node-that-crashed 12\n")
    fcntl.flock(other, fcntl.LOCK_EX)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: os.close(other))  # the server gives up on it
    with run_lock(tmp_path, single_process_mesh()) as told:
        assert told == []


def test_without_locks_the_run_goes_on_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unknown)
    with run_lock(tmp_path, single_process_mesh()) as (told,):
        assert "no lock on" in told


def _refused(mesh: Mesh, folder: Path) -> str:
    try:
        with run_lock(folder, mesh):
            return ""
    except ConfigError as error:
        return str(error)


def test_all_ranks_hear_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    first, second = run_mesh(Sizes(dp_shard=2), _refused, tmp_path / "file")
    assert first == second
    assert "cannot be written to" in first
    assert run_mesh(Sizes(dp_shard=2), _refused, tmp_path / "run") == ["", ""]


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "run.toml"])
def test_a_folder_in_the_place_of_a_file_is_told_before_anything_is_trained(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    told = f"{name} in it: a file is written there, and it is a folder"
    with pytest.raises(ConfigError, match=told), run_lock(tmp_path, single_process_mesh()):
        pass
