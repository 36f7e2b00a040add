"""The first steps of every small run file on two ranks: the validation loss falls, and is a sound number."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from meshwright.data.prepare import PrepareOptions, prepare

RUNS = Path(__file__).resolve().parents[3] / "runs"
FILES = [RUNS / f"{name}.toml" for name in ("dense_small", "hybrid_tiny", "mamba_tiny", "moe_tiny")]
FILES += sorted((RUNS / "parts").glob("*.toml"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare a few of the standard library's files."""
    out = tmp_path_factory.mktemp("corpus") / "store"
    sources = tuple(str(Path(os.__file__).parent / name) for name in ("argparse.py", "ast.py", "cmd.py", "pdb.py"))
    prepare(PrepareOptions(out, sources, text_unit="paragraph", vocab_size=512, validation_fraction=0.2, workers=1))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_validation_loss_falls(path: Path, store: Path, tmp_path: Path) -> None:
    keys = f"data.store={store} run.folder={tmp_path / 'run'} run.device=cpu train.threads=1"
    keys += " data.seq_len=64 train.steps=12 evaluation.every=4 evaluation.samples=16 checkpoint.every=0"
    command = [sys.executable, "-m", "meshwright.launcher", "train", str(path), "--ranks", "2", *keys.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = next(record["loss"] for record in records if "loss" in record)
    # Early ones: soon after, losses on so small a corpus rest for a while at that of its tokens' frequencies.
    early, _, last = (record["validation_loss"] for record in records if "validation_loss" in record)
    assert last < early < first
