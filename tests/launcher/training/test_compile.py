"""torch.compile by a key: the same losses, and refused where it could not be honoured."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import build, numbers, start

from meshwright.launcher.build import check_compiler
from meshwright.launcher.runfile.messages import ConfigError


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU; g++ is not here")
def test_a_compiled_run_has_the_losses_of_an_eager_one(tmp_path: Path) -> None:
    (tmp_path / "eager").mkdir()
    (tmp_path / "compiled").mkdir()
    start(tmp_path / "eager")
    # A process of its own: here the shapes of every call are checked, which the compiler cannot see through.
    script = (
        "import sys; from pathlib import Path; import tiny_run; from torch._dynamo.utils import counters\n"
        "tiny_run.start(Path(sys.argv[1]), 'train.compile=true')\n"
        "print('compiled graphs:', counters['stats']['unique_graphs'])"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "compiled")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["tests", "src"]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("compiled graphs:")[1]) >= 2
    # fp32: fused operations round otherwise
    assert numbers(tmp_path / "compiled", "loss") == pytest.approx(numbers(tmp_path / "eager", "loss"), rel=1e-5)


def test_a_dense_layer_is_one_graph() -> None:
    # Whatever a layer asks of its place, such as angles for all layers: nothing there may break the graph.
    script = (
        "import torch; from engine_cases import dense_config; from meshwright.model.parts import build_model\n"
        "from meshwright.parallel.where import where_of_plain_tokens\n"
        "config = dense_config(); layer = build_model(config, seed=1).layers['0']\n"
        "where = where_of_plain_tokens(torch.zeros(6, 2, dtype=torch.int64))\n"
        "seen = torch._dynamo.explain(layer.forward)(torch.randn(6, 2, config.hidden_size), where, None)\n"
        "print('graphs:', seen.graph_count, 'breaks:', seen.graph_break_count)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["tests", "src"]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("graphs: 1 breaks: 0\n"), done.stdout + done.stderr


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_compile_is_refused_with_recompute(tmp_path: Path, mode: str) -> None:
    with pytest.raises(ConfigError, match=f'train.compile = true: is not possible with recompute.mode = "{mode}"'):
        build(tmp_path, ["train.compile=true", f"recompute.mode={mode}"])


def test_compile_is_refused_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = build(tmp_path, ["train.compile=true"])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="apt-get install g"):
        check_compiler(run.run_file, torch.device("cpu"))
    check_compiler(build(tmp_path, []).run_file, torch.device("cpu"))
