"""The wheel and the source archive hold every module; the pins are exactly what the package needs."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FOLDERS = ("launcher", "parallel", "model", "data", "kernels")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy what git tracks, links as links, so that building leaves nothing behind here."""
    folder = tmp_path_factory.mktemp("clone")
    names = (
        "src",
        *FOLDERS,
        "slurm",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "MANIFEST.in",
        "constraints.txt",
        "runs",
    )
    for name in names:
        if (ROOT / name).exists():
            subprocess.run(["cp", "-a", str(ROOT / name), str(folder)], check=True)
    return folder


def build(clone: Path, what: str, out: Path) -> Path:
    """Build "wheel" or "sdist" with the setuptools that is installed, and return the file."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD, f"build_{what}", str(out)], cwd=clone, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


def modules() -> set[str]:
    code = {str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    return code | {f"slurm/{path.name}" for path in (ROOT / "slurm").glob("*.sh")}


@pytest.fixture(scope="module")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(clone, "wheel", tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_every_module_and_job_script(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name.removeprefix("meshwright/") for name in archive.namelist() if name.startswith("meshwright/")}
        strangers = {name for name in archive.namelist() if not name.startswith(("meshwright/", "meshwright-"))}
    assert modules() - held == set()
    assert {name for name in held if name.endswith((".py", ".sh"))} == modules()
    assert strangers == set()


def test_the_wheel_names_its_licence_and_its_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        text = {Path(name).name: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name}
    assert "Apache License" in text["LICENSE"]
    assert "meshwright = meshwright.launcher.__main__:main" in text["entry_points.txt"]
    assert "License-Expression: Apache-2.0" in text["METADATA"]


def test_an_installed_wheel_runs_without_the_clone(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); "
    code += "import meshwright.launcher.__main__ as m; print(m.__file__); m.main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tmp_path / "site"), "--help"],
        cwd=tmp_path, env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site"))
    assert "prepare" in done.stdout


def test_the_source_archive_holds_files_and_no_links(clone: Path, tmp_path: Path) -> None:
    with tarfile.open(build(clone, "sdist", tmp_path)) as archive:
        members = archive.getmembers()
    held = {member.name.split("/", 1)[1] for member in members if member.isfile()}
    assert {f"src/meshwright/{name}" for name in modules() if name.endswith(".py")} - held == set()
    assert {"LICENSE", "pyproject.toml", "src/meshwright/slurm/pretrain_moe.sh"} - held == set()
    assert [member.name for member in members if member.issym()] == []


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    found = [re.fullmatch(r"([a-z0-9-]+)==([0-9][0-9a-z.]*)", line) for line in lines]
    assert all(found), [line for line, match in zip(lines, found, strict=True) if match is None]
    return {match[1]: match[2] for match in found if match}


def needed() -> dict[str, str]:
    """Return what pyproject.toml names, and what that needs in turn here: name and installed version."""
    extras = PROJECT["project"]["optional-dependencies"]
    named = [
        *PROJECT["project"]["dependencies"],
        *extras["export"],
        *extras["test"],
        *PROJECT["build-system"]["requires"],
    ]
    queue, seen = [Requirement(text) for text in named], set()
    versions: dict[str, str] = {}
    while queue:
        wanted = queue.pop()
        name = canonicalize_name(wanted.name)
        if (name, frozenset(wanted.extras)) in seen:
            continue
        seen.add((name, frozenset(wanted.extras)))
        found = importlib.metadata.distribution(name)
        versions[name] = found.version.split("+")[0]
        for inner in map(Requirement, found.requires or []):
            if any(
                inner.marker is None or inner.marker.evaluate({"extra": extra}) for extra in (wanted.extras or {""})
            ):
                queue.append(inner)
    return versions


def test_the_pins_keep_what_pyproject_asks() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    for text in (*PROJECT["project"]["dependencies"], *extras["export"], *extras["test"]):
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins()[canonicalize_name(wanted.name)]), text
        # slurm/environment.sh reads these lines without a library.
        assert re.fullmatch(r"[\w.-]+>=[\d.]+", text), text


@pytest.mark.skipif(
    Path(sys.prefix) != ROOT / ".venv", reason="an environment of the user's own has versions of its own"
)
def test_the_pins_are_what_is_installed_and_no_more() -> None:
    assert pins() == needed()
