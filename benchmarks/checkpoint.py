"""Time writing and reading a checkpoint: `python benchmarks/checkpoint.py --mib 512 --folder /path/on/the/disk`.

Prints one JSON line for each way of saving, all on the same tensors, one after the other in each round:

    ours                hashed, every file on the disk (fsync), renamed when whole; loading verifies every byte first
    ours, read only     the same, loaded after `newest_that_verifies` has read the files already
    ours, background    saving is what training waits for: the copy of the state; a thread writes it
    torch.save          zip with pickle; torch.load(weights_only=True)
    dcp                 torch.distributed.checkpoint's own FileSystemWriter and FileSystemReader (fsync, no hash)
    safetensors         save_file and load_file

Peers are timed as their users call them and, "+ fsync", with their file brought to the disk as ours is. Loading
ends when the numbers are in tensors that exist, as a model's do, and the files are in the file cache. Rates are of
the tensors' bytes, in one process.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load_state
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save_state

from meshwright.parallel.checkpoint.load import Expect, load_checkpoint
from meshwright.parallel.checkpoint.save import AsyncSaver, save_checkpoint
from meshwright.parallel.mesh import single_process_mesh

MESH = single_process_mesh()
Tensors = dict[str, Tensor]
Way = tuple[Callable[[Path, Tensors], None], Callable[[Path, Tensors], Tensors] | None]


def state_of(mib: int) -> Tensors:
    """Return a model's weights in bf16 with two fp32 moments, in matrices of four million elements and less."""
    tensors: Tensors = {}
    per_layer = (4 << 20) * (2 + 4 + 4)
    for layer in range(max(1, (mib << 20) // per_layer)):
        weight = torch.randn(2048, 2048)
        tensors[f"layers.{layer}.weight"] = weight.bfloat16()
        tensors[f"optimizer.first.layers.{layer}.weight"] = weight * 0.1
        tensors[f"optimizer.second.layers.{layer}.weight"] = weight.square()
        tensors[f"layers.{layer}.norm"] = torch.ones(2048)
    return tensors


def copied(loaded: Tensors, into: Tensors) -> Tensors:
    """Bring what a library loaded into the tensors that exist."""
    for name, tensor in into.items():
        tensor.copy_(loaded[name])
    return into


def synced(path: Path) -> None:
    """Bring a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def ours(folder: Path, tensors: Tensors) -> None:
    """Save as a run does."""
    save_checkpoint(folder, 1, tensors, {}, MESH, "benchmark")


def ours_background(folder: Path, tensors: Tensors) -> None:
    """Start a save; the writing is not waited for."""
    SAVER.save(folder, 1, tensors, {}, "benchmark")


def load_ours(folder: Path, into: Tensors) -> Tensors:
    """Verify every byte, then load."""
    load_checkpoint(folder / "step_00000001", into, MESH)
    return into


def load_ours_verified(folder: Path, into: Tensors) -> Tensors:
    """Load what was verified just now."""
    load_checkpoint(folder / "step_00000001", into, MESH, Expect(is_verified=True))
    return into


def torch_save(folder: Path, tensors: Tensors) -> None:
    """Save as most scripts do."""
    torch.save(tensors, folder / "file")


def torch_load(folder: Path, into: Tensors) -> Tensors:
    """Load without running code from the file."""
    return copied(torch.load(folder / "file", weights_only=True), into)


def dcp_save(folder: Path, tensors: Tensors) -> None:
    """Save through torch's own storage."""
    dcp_save_state(dict(tensors), storage_writer=FileSystemWriter(folder))


def dcp_load(folder: Path, into: Tensors) -> Tensors:
    """Load through torch's own storage."""
    dcp_load_state(into, storage_reader=FileSystemReader(folder))
    return into


def safetensors_save(folder: Path, tensors: Tensors) -> None:
    """Save as models are shared."""
    save_file(tensors, folder / "file")


def safetensors_load(folder: Path, into: Tensors) -> Tensors:
    """Load as models are shared."""
    return copied(load_file(folder / "file"), into)


def with_fsync(save: Callable[[Path, Tensors], None]) -> Callable[[Path, Tensors], None]:
    """Return the same with the file brought to the disk."""

    def both(folder: Path, tensors: Tensors) -> None:
        save(folder, tensors)
        synced(folder / "file")

    return both


SAVER = AsyncSaver(MESH)
WAYS: dict[str, Way] = {
    "ours": (ours, load_ours),
    "ours, read only": (ours, load_ours_verified),
    "ours, background": (ours_background, None),
    "torch.save": (torch_save, torch_load),
    "torch.save + fsync": (with_fsync(torch_save), None),
    "dcp": (dcp_save, dcp_load),
    "safetensors": (safetensors_save, safetensors_load),
    "safetensors + fsync": (with_fsync(safetensors_save), None),
}


def measure(way: Way, folder: Path, tensors: Tensors) -> tuple[float, float | None]:
    """Save into an empty folder and load again; return both times, after seeing that every bit came back."""
    save, load = way
    folder.mkdir()
    began = time.perf_counter()
    save(folder, tensors)
    saved = time.perf_counter() - began
    SAVER.wait()
    loaded = None
    if load is not None:
        into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        began = time.perf_counter()
        back = load(folder, into)
        loaded = time.perf_counter() - began
        assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    shutil.rmtree(folder)
    return saved, loaded


def rates(size: int, seconds: list[float]) -> dict[str, float]:
    """Return median and quartiles in MB/s."""
    each = sorted(size / second / 1e6 for second in seconds)
    low, middle, high = statistics.quantiles(each, n=4)
    return {"median": round(middle), "quartile_low": round(low), "quartile_high": round(high)}


def main() -> None:
    """Go through all ways in each round, then print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512, help="size of the state (default 512)")
    parser.add_argument("--rounds", type=int, default=7, help="3 or more (default 7)")
    parser.add_argument("--folder", type=Path, default=None, help="where to write (default: the temporary folder)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # dcp says that there is one process
    tensors = state_of(args.mib)
    size = sum(tensor.nbytes for tensor in tensors.values())
    times: dict[str, list[tuple[float, float | None]]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory(dir=args.folder) as base:
        measure(WAYS["ours"], Path(base) / "warm-up", tensors)
        for number in range(args.rounds):
            for name, way in WAYS.items():
                times[name].append(measure(way, Path(base) / f"{number}", tensors))
    for name, taken in times.items():
        row: dict[str, object] = {"benchmark": "checkpoint", "way": name, "mb": round(size / 1e6)}
        row["save_mb_per_s"] = rates(size, [saved for saved, _ in taken])
        reads = [loaded for _, loaded in taken if loaded is not None]
        row["load_mb_per_s"] = rates(size, reads) if reads else None
        row |= {"rounds": args.rounds, "torch": torch.__version__, "threads": torch.get_num_threads()}
        row |= {"machine": platform.machine(), "cores": os.cpu_count()}
        print(json.dumps(row))


if __name__ == "__main__":
    main()
