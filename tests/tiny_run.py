"""A tiny run for the tests of training: a store that is made once, a run file, and a start on any layout.

`start(overrides)` is what `meshwright train` does on one process, without the process; `start_on` the same on the
ranks of a mesh of the pool.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rank_pool import SHARED

from meshwright.data.prepare import PrepareOptions, prepare
from meshwright.data.store import TokenStore
from meshwright.kernels.choose import Choices
from meshwright.launcher.build import Run, build_run, sizes_of, with_vocab_of
from meshwright.launcher.kernel_choices import Chosen
from meshwright.launcher.observe import summary
from meshwright.launcher.observe.peak import Peak
from meshwright.launcher.runfile.read import read_run_file
from meshwright.launcher.training import start as training_start
from meshwright.launcher.training.start import train_on
from meshwright.launcher.training.stopping import Signals
from meshwright.parallel.mesh import Mesh, Sizes, single_process_mesh

RUN_FILE = """
[run]
name = "tiny"
device = "cpu"
timeout_seconds = 60
[model]
pattern = "*E"
num_layers = 2
hidden_size = 16
num_heads = 2
num_kv_heads = 1
qk_norm = true
[model.moe]
num_experts = 4
top_k = 2
expert_hidden_size = 12
num_shared_experts = 1
load_balancing = "step"
[data]
store = "STORE"
seq_len = 16
[train]
steps = 6
global_batch_size = 8
micro_batch_size = 2
[learning_rate]
peak = 1e-2
[evaluation]
every = 3
samples = 7
[checkpoint]
every = 3
"""


@cache
def tiny_store() -> Path:
    """Make the store once for this process and its ranks, whichever of them asks first."""
    made = Path(SHARED.name, "tiny-store")
    if made.exists():
        return made / "store"
    folder = Path(tempfile.mkdtemp(prefix="tiny-store-", dir=SHARED.name))
    words = ["tensor", "rank", "mesh", "expert", "token", "layer", "loss", "grows", "slowly", "never"]
    for number in range(24):
        chosen = [words[(number * 31 + at * at * 7 + at // 5) % len(words)] for at in range(120)]
        (folder / f"{number:02}.txt").write_text(f"Document {number}: " + " ".join(chosen) + ".\n")
    out = folder / "store"
    prepare(PrepareOptions(out, (str(folder / "*.txt"),), vocab_size=300, validation_fraction=0.2, workers=1))
    with suppress(OSError):  # another rank was first
        folder.rename(made)
    return made / "store"


def write_run_file(folder: Path) -> Path:
    """Write the tiny run file; its output goes to `folder`/run."""
    path = folder / "tiny.toml"
    text = RUN_FILE.replace("STORE", str(tiny_store()))
    text = text.replace('name = "tiny"', f'name = "tiny"\nfolder = "{folder / "run"}"')
    if not path.exists():
        aside = path.with_suffix(f".{os.getpid()}")  # several ranks may write it at once
        aside.write_text(text)
        aside.replace(path)
    return path


def build(folder: Path, overrides: list[str], mesh: Mesh | None = None) -> Run:
    """Build the run on one process, or on the given mesh."""
    mesh = mesh or single_process_mesh()
    run_file = read_run_file(write_run_file(folder), overrides, world_size=mesh.world.size)
    store = TokenStore.open(run_file.data.store)
    run_file = with_vocab_of(run_file, store)
    assert sizes_of(run_file, mesh.world.size) == mesh.sizes
    return build_run(run_file, store, mesh, torch.device("cpu"))


def start(folder: Path, *overrides: str, allow_change: tuple[str, ...] = (), picture: bool = False) -> Run:
    """Train on one process, from the newest checkpoint if there is one."""
    run = build(folder, list(overrides))
    with _quick(picture):
        train_on(run, Signals(), allow_change)
    return run


@contextmanager
def _quick(picture: bool = False) -> Iterator[None]:
    """Leave out what takes a second each time and is tested elsewhere: the measured peak and the picture."""
    with ExitStack() as stack:
        peak = Peak(1e11, "not measured")
        stack.enter_context(patch.object(training_start, "choose_peak", lambda device, dtype: peak))
        chosen = Chosen(Choices(), [])
        stack.enter_context(patch.object(training_start, "choices_of_run", lambda *given: chosen))
        if not picture:
            stack.enter_context(patch.object(summary, "draw_losses", lambda *given: None))
        yield


def start_on(mesh: Mesh, folder: Path, overrides: list[str]) -> None:
    """Train on the ranks of a mesh: a case for `run_mesh`."""
    with _quick():
        train_on(build(folder, overrides, mesh), Signals())


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run, in order."""
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def numbers(folder: Path, name: str, kind: str = "step") -> list[float]:
    """Return one number of every record of a kind."""
    return [record[name] for record in metrics(folder) if record["kind"] == kind]


def checkpoint_bytes(folder: Path, step: int) -> dict[str, bytes]:
    """Return the content of every tensor file of a checkpoint."""
    path = folder / "run" / "checkpoints" / f"step_{step:08}"
    return {file.name: file.read_bytes() for file in sorted(path.glob("*.bin"))}


def saved_state(folder: Path, step: int) -> dict[str, Any]:
    """Return the small values of a checkpoint, without the paths that differ from folder to folder."""
    path = folder / "run" / "checkpoints" / f"step_{step:08}" / "state.json"
    state: dict[str, Any] = json.loads(path.read_bytes())
    return state | {"run_file": state["run_file"].replace(str(folder), "")}


EP2 = Sizes(dp_shard=2, ep=2)
