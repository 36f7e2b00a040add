"""Compiled layers on two ranks compute what eager ones do on one: each axis, the real command, three steps."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from faults.real_command import own_environment
from tiny_run import numbers, start, write_run_file

# Runs the command as it is, and lets each rank tell how much of it was compiled.
COUNTING = """
import atexit, os, sys
def tell():
    if "RANK" in os.environ and "torch._dynamo.utils" in sys.modules:
        graphs = sys.modules["torch._dynamo.utils"].counters["stats"]["unique_graphs"]
        open(os.path.join(os.path.dirname(sys.argv[0]), "graphs." + os.environ["RANK"]), "w").write(str(graphs))
atexit.register(tell)
from meshwright.launcher.__main__ import main
main()
"""
LAYOUTS = {
    "tp": ["parallel.tp=2"],
    "cp": ["parallel.cp=2"],
    "ep": ["parallel.ep=2", "zero.stage=1"],
    "ZeRO-3": ["zero.stage=3"],
    "pp": ["parallel.pp=2"],
}
STEPS = ("train.steps=3", "evaluation.every=0", "checkpoint.every=0", "train.precision=fp64")


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, nothing compiled."""
    folder = tmp_path_factory.mktemp("eager")
    start(folder, *STEPS)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU; g++ is not here")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_compiled_layout_has_the_losses_and_norms_of_an_eager_process(
    layout: str, eager: Path, tmp_path: Path
) -> None:
    script = tmp_path / "meshwright"
    script.write_text(COUNTING)
    # In processes without the tests' type checks; a rank that has compiled waits for the other.
    keys = [*STEPS, *LAYOUTS[layout], "train.compile=true", "run.timeout_seconds=500"]
    done = subprocess.run(
        [sys.executable, str(script), "train", str(write_run_file(tmp_path)), "--ranks", "2", *keys],
        env=own_environment() | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    graphs = [int((tmp_path / f"graphs.{rank}").read_text()) for rank in (0, 1)]
    assert min(graphs) >= 1, graphs
    for name in ("loss", "grad_norm"):
        # fp64: fused operations and the ranks' sums add up in another order, and no more.
        assert numbers(tmp_path, name) == pytest.approx(numbers(eager, name), rel=1e-10)
        assert len(set(numbers(eager, name))) == 3
