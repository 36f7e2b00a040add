"""What the tests of the job script share: a small corpus, a tiny run, and what it gives by hand."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from virtual_slurm import VirtualSlurm, why_not

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "pretrain_moe.sh"


@dataclass(frozen=True)
class TinyRun:
    """A run of a few steps, and the environment in which this interpreter is the active one."""

    store: Path
    folder: Path

    def arguments(self, name: str) -> list[str]:
        """Return the overrides that make a tiny run called `name`."""
        sizes = "model.num_layers=1 model.hidden_size=32 model.num_heads=2 model.head_dim=16 model.moe.num_experts=4"
        steps = "train.steps=4 train.global_batch_size=8 train.micro_batch_size=2 train.threads=1 data.seq_len=32"
        every = "evaluation.every=4 evaluation.samples=8 checkpoint.every=4 log.every=1 run.device=cpu"
        places = [f"data.store={self.store}", f"run.name={name}", f"run.folder={self.folder / name}"]
        return [*f"{sizes} {steps} {every}".split(), *places]

    def losses(self, name: str) -> list[float]:
        """Return the training and validation losses that the run wrote, in order."""
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        records: list[dict[str, Any]] = [json.loads(line) for line in lines]
        return [float(record[key]) for record in records for key in ("loss", "validation_loss") if key in record]


@pytest.fixture(scope="session", autouse=True)
def _active_environment() -> Iterator[None]:
    """Let `python` be this interpreter, as in an environment that the user has activated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        patch.setenv("OMP_NUM_THREADS", "1")
        for name in list(os.environ):
            if name.startswith(("SLURM_", "MESHWRIGHT_", "MASTER_")) or name in ("RANK", "WORLD_SIZE"):
                patch.delenv(name)
        yield


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Prepare a small corpus from a few of the standard library's files."""
    folder = tmp_path_factory.mktemp("tiny-run")
    sources = [str(Path(os.__file__).parent / name) for name in ("argparse.py", "ast.py", "bdb.py", "cmd.py")]
    options = ["--documents", "paragraph", "--validation-fraction", "0.2", "--vocab-size", "512", "--workers", "1"]
    command = [
        sys.executable,
        "-m",
        "meshwright.launcher",
        "prepare",
        *sources,
        "--out",
        str(folder / "store"),
        *options,
    ]
    subprocess.run(command, check=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT / "src")})
    return TinyRun(folder / "store", folder)


@pytest.fixture(scope="session")
def by_hand(tiny_run: TinyRun) -> subprocess.CompletedProcess[str]:
    """Run the whole script by hand, on two ranks."""
    return subprocess.run(
        ["bash", str(SCRIPT), *tiny_run.arguments("by-hand")],
        cwd=tiny_run.folder,  # it need not be called from the clone
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualSlurm]:
    """Start a Slurm of two virtual nodes, or skip with the reason why there is none."""
    if reason := why_not():
        pytest.skip(reason)
    slurm = VirtualSlurm(tmp_path_factory.mktemp("slurm"))
    yield slurm
    slurm.stop()
