"""slurm/environment.sh uses what is active, makes what is missing, and trusts nothing that is half made."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT

USE = """
set -euo pipefail
source slurm/environment.sh
echo "PYTHON $meshwright_python"
"$meshwright_python" -c "import tiny"
"""
# A package that pip can install without an index: it builds itself, in as little as a wheel needs.
BACKEND = """
import os, time, zipfile
def build_editable(folder, config_settings=None, metadata_directory=None):
    with open("builds", "a") as log: log.write("built\\n")
    time.sleep(float(os.environ.get("TINY_SECONDS", "0")))
    assert not os.path.exists("broken"), "the build is broken"
    with zipfile.ZipFile(f"{folder}/tiny-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny.pth", os.getcwd() + "/src\\n")
        wheel.writestr("tiny-1.dist-info/METADATA", "Metadata-Version: 2.1\\nName: tiny\\nVersion: 1\\nProvides-Extra: export\\nProvides-Extra: test\\n")
        wheel.writestr("tiny-1.dist-info/WHEEL", "Wheel-Version: 1.0\\nGenerator: x\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("tiny-1.dist-info/RECORD", "tiny.pth,,\\ntiny-1.dist-info/METADATA,,\\ntiny-1.dist-info/WHEEL,,\\ntiny-1.dist-info/RECORD,,\\n")
    return "tiny-1-py3-none-any.whl"
def build_wheel(*args): raise RuntimeError("editable only")
"""  # noqa: E501
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "tiny"
version = "1"
dependencies = []
[project.optional-dependencies]
export = []
test = []
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Make a clone whose package needs nothing, so that setting it up takes a second or two."""
    folder = tmp_path / "clone"
    (folder / "slurm").mkdir(parents=True)
    (folder / "src").mkdir()
    shutil.copy2(ROOT / "slurm" / "environment.sh", folder / "slurm")
    (folder / "src" / "tiny.py").write_text("")
    (folder / "backend.py").write_text(BACKEND)
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "constraints.txt").write_text("# nothing\n")
    return folder


def stub(folder: Path, **programs: str) -> str:
    """Return a PATH on which these programs come first, each a line of shell."""
    folder.mkdir(exist_ok=True)
    for name, line in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """Return an environment whose `python3` has no torch, but can make a virtual environment."""
    base = shutil.which("python3", path=f"{sys.base_prefix}/bin") or sys.executable
    pass_on = f'exec {base} -I "$@"'
    without = 'case "$1" in -) cat >/dev/null; exit 1;; esac; '
    path = stub(tmp_path / "bin", python="exit 1", python3=without + pass_on)
    return os.environ | {"PATH": path, "PIP_NO_INDEX": "1"}


def use(clone: Path, environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", "-c", USE], cwd=clone, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def builds(clone: Path) -> int:
    return len((clone / "builds").read_text().splitlines()) if (clone / "builds").exists() else 0


@pytest.mark.slow
def test_it_is_made_once_and_again_only_when_the_pins_change(clone: Path, bare: dict[str, str]) -> None:
    first = use(clone, bare)
    assert (first.returncode, first.stdout) == (0, f"PYTHON {clone}/.venv/bin/python\n"), first.stderr
    assert "Setting up" in first.stderr
    second = use(clone, bare)
    assert (second.returncode, second.stderr, builds(clone)) == (0, "", 1)
    (clone / "constraints.txt").write_text("# other pins\n")
    assert (use(clone, bare).returncode, builds(clone)) == (0, 2)


@pytest.mark.slow
def test_a_set_up_that_failed_is_not_trusted_and_begun_anew(clone: Path, bare: dict[str, str]) -> None:
    (clone / "broken").touch()
    failed = use(clone, bare)
    assert failed.returncode == 2
    assert "The set-up failed" in failed.stderr
    (clone / ".venv" / "left-over").touch()
    (clone / "broken").unlink()
    assert use(clone, bare).returncode == 0
    assert not (clone / ".venv" / "left-over").exists()


@pytest.mark.slow
def test_a_set_up_that_was_killed_is_begun_anew(clone: Path, bare: dict[str, str]) -> None:
    slow = subprocess.Popen(
        ["bash", "-c", USE],
        cwd=clone,
        env=bare | {"TINY_SECONDS": "60"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while builds(clone) == 0:
        assert slow.poll() is None
    os.killpg(slow.pid, 9)
    slow.wait()
    assert use(clone, bare).returncode == 0
    assert (clone / ".venv" / "complete").exists()


@pytest.mark.slow
def test_two_at_once_set_up_one_environment(clone: Path, bare: dict[str, str]) -> None:
    both = [
        subprocess.Popen(["bash", "-c", USE], cwd=clone, env=bare, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert builds(clone) == 1
    assert sum("Waiting for another script" in text for text in said) == 1


def test_nothing_is_installed_where_that_is_forbidden(clone: Path, bare: dict[str, str]) -> None:
    refused = use(clone, bare | {"MESHWRIGHT_MAY_INSTALL": "0"})
    assert refused.returncode == 2
    assert "no python with torch >= 2.11 is active" in refused.stderr
    assert not (clone / ".venv").exists()


def test_an_active_environment_with_torch_is_used_as_it_is(clone: Path) -> None:
    used = use(clone, dict(os.environ))
    assert "PYTHON " + str(shutil.which("python")) in used.stdout, used.stderr
    assert not (clone / ".venv").exists()


def test_what_an_active_environment_lacks_is_named(clone: Path) -> None:
    pyproject = clone / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace("dependencies = []", 'dependencies = ["no-such-thing>=3.1"]', 1))
    refused = use(clone, dict(os.environ))
    assert refused.returncode == 2
    assert "-m pip install 'no-such-thing>=3.1'" in refused.stderr
    assert not (clone / ".venv").exists()


OLD_PYTHON = 'case "$*" in *"%d.%d"*) echo 3.10;; *) exit 1;; esac'
NO_ENSUREPIP = 'case "$*" in *"%d.%d"*) echo 3.12;; *ensurepip*) exit 1;; -*" - "*|"- "*|-) exit 1;; *) exit 0;; esac'


@pytest.mark.parametrize(
    ("python", "package"), [(OLD_PYTHON, "apt-get install python3 "), (NO_ENSUREPIP, "apt-get install python3.12-venv")]
)
def test_a_missing_system_package_is_named(clone: Path, tmp_path: Path, python: str, package: str) -> None:
    names = ("python", "python3", "python3.11", "python3.12", "python3.13", "python3.14")
    path = stub(tmp_path / "bin", **dict.fromkeys(names, python))
    refused = use(clone, os.environ | {"PATH": path})
    assert refused.returncode == 2
    assert package in refused.stderr
    assert not (clone / ".venv").exists()
