"""`doctor` says what is there; a package that is missing, broken or another program is an answer, not an error."""

import sys
from pathlib import Path

import pytest

from meshwright.launcher.commands.doctor import PACKAGES, Package, doctor, malloc_rows, package_rows, probe, rank_rows


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, version: str = "") -> None:
    """Put a package of one module where Python finds it."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text)
    if version:
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, name, raising=False)


def test_everything_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    doctor()
    printed = capsys.readouterr().out
    for word in ("cores", "memory", "torch  ", "gloo", "cuda", "mps", *(package.distribution for package in PACKAGES)):
        assert f"  {word}" in printed


def test_a_package_that_is_not_installed_is_told() -> None:
    assert probe(Package("surely_not_here", "surely-not-here", "nothing", False)) == "not installed"


def test_a_package_that_is_there_has_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "pretend_fast", "", version="1.2.3")
    assert probe(Package("pretend_fast", "pretend-fast", "nothing", False)) == "1.2.3"


def test_a_package_that_is_half_installed_gives_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "import warnings\nwarnings.warn('old')\nraise RuntimeError('no CUDA library\\nsecond line')"
    install(tmp_path, monkeypatch, "pretend_engine", text)
    found = probe(Package("pretend_engine", "pretend-engine", "nothing", False))
    assert found == "installed, but does not load: RuntimeError: no CUDA library"


def test_pypis_apex_is_named_as_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "apex", "raise ModuleNotFoundError('pyramid_mailer')")
    assert "another program of that name" in dict(package_rows())["apex"]
    (tmp_path / "apex" / "optimizers").mkdir()
    assert "does not load: ModuleNotFoundError: pyramid_mailer" in dict(package_rows())["apex"]


def test_a_malloc_setting_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    assert "not set here" in dict(malloc_rows())
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "7")
    assert dict(malloc_rows()) == {"set": "MALLOC_TRIM_THRESHOLD_=7"}
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so")
    assert "jemalloc" in dict(malloc_rows())["allocator"]


def test_a_launchers_variables_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "16")
    assert ("SLURM_NTASKS", "16") in list(rank_rows())
