"""What a run was made with: versions, git state, command line, host and device, in provenance.json.

    {"starts": [{"time": ..., "command": [...], "versions": {...}, "git": {...}, "host": {...}, "device": {...}}, ...]}

A run that resumes adds one start, so that a change of version or code in its middle is seen. Nothing here may end
a run: what cannot be found out is a "problem" in its place, and what cannot be written is an answer of the call.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

PROVENANCE_FILE = "provenance.json"
PACKAGES = ("meshwright", "torch", "numpy", "pydantic", "tokenizers", "safetensors", "zarr", "pyarrow", "transformers")
# What places a run on a cluster; nothing that could hold a secret.
VARIABLES = ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_NNODES", "SLURM_NTASKS", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES")
_CODE = (".py", ".toml", ".sh")
_GIT_SECONDS = 10


def write_provenance(folder: Path, device: torch.device) -> tuple[dict[str, Any], str]:
    """Add this start to the run's provenance.json; return it, and why it was not written ("" if it was)."""
    start = collect_provenance(device)
    path = folder / PROVENANCE_FILE
    aside = path.with_name(path.name + ".new")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"starts": [*_earlier_starts(path), start]}, indent=2)
        aside.write_text(text + "\n", encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        return start, f"{path} was not written: {error}"
    return start, ""


def collect_provenance(device: torch.device) -> dict[str, Any]:
    """Return what can be found out about this start."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": [sys.executable, *sys.argv],
        "folder": _attempt(os.getcwd),
        "versions": _attempt(versions),
        "git": _attempt(git_state),
        "host": _attempt(_host),
        "device": _attempt(lambda: _device(device)),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a run; one that is absent is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_state(folder: Path | None = None) -> dict[str, Any]:
    """Return commit, whether anything differs from it, and a hash of what does, for the checkout of this package.

    An installed package has none, also where it lies inside the checkout of something else.
    """
    folder = folder or Path(__file__).resolve().parents[2]
    top = _git(folder, "rev-parse", "--show-toplevel").decode().strip()
    if Path(top).resolve() != folder.resolve():
        return {"problem": "meshwright is installed as a package, not run from a checkout"}
    changes = _git(folder, "status", "--porcelain", "-z", "--untracked-files=all")
    state: dict[str, Any] = {
        "commit": _git(folder, "rev-parse", "HEAD").decode().strip(),
        "branch": _git(folder, "rev-parse", "--abbrev-ref", "HEAD").decode().strip(),
        "dirty": bool(changes),
    }
    if changes:
        state["diff_hash"] = _hash_of_changes(folder, changes)
    return state


def _hash_of_changes(folder: Path, changes: bytes) -> str:
    """Return a hash of which files differ, of the differences, and of code files that git does not know yet."""
    digest = hashlib.sha256(changes)
    digest.update(_git(folder, "diff", "HEAD", "--binary"))
    for name in sorted(_git(folder, "ls-files", "--others", "--exclude-standard", "-z").decode().split("\0")):
        path = folder / name
        if name.endswith(_CODE) and path.is_file():
            digest.update(path.read_bytes())
    return f"sha256:{digest.hexdigest()}"


def _git(folder: Path, *words: str) -> bytes:
    """Return what git prints; without its optional locks, so that it disturbs no git at work in the same checkout."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *words]
    done = subprocess.run(command, capture_output=True, timeout=_GIT_SECONDS)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.decode(errors="replace").strip())
    return done.stdout


def _host() -> dict[str, Any]:
    return {
        "name": platform.node(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def _device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {
            "kind": device.type,
            "name": platform.processor() or platform.machine(),
            "torch_cuda": torch.version.cuda,
        }
    return {
        "kind": "cuda",
        "name": torch.cuda.get_device_name(device),
        "memory_gib": round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1),
        "torch_cuda": torch.version.cuda,
    }


def _attempt(find_out: Callable[[], Any]) -> Any:
    """Return what a question yields, or the reason why it yields nothing."""
    try:
        return find_out()
    except Exception as error:  # whatever it is, a run must not end because its description is incomplete
        return {"problem": f"{type(error).__name__}: {error}"}


def _earlier_starts(path: Path) -> list[Any]:
    """Return the starts that the file holds; a file that cannot be read as such holds none."""
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))["starts"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return starts if isinstance(starts, list) else []
