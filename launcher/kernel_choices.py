"""Which way the CPU kernels of a run go: as its checkpoint says, else as this machine was measured, once.

    resumed run     the choices in its checkpoint, so that it is bitwise the unbroken run, wherever it goes on
    new run         those measured on this machine earlier; else rank 0 measures and remembers them
    fp64, GPU, mps  PyTorch's own way: nothing is measured

Remembered, because two runs of one layout on one machine are to be bitwise the same, and a near tie could be decided
either way by a second measurement. They lie in $XDG_CACHE_HOME/meshwright (default ~/.cache/meshwright), one file for
each processor, torch version and list of choices; deleting it makes the next new run measure again.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from meshwright.kernels.attention.flash import slower_than_flash
from meshwright.kernels.choose import Choices, choices_from_dict
from meshwright.kernels.matmul.grouped import slower_than_grouped
from meshwright.kernels.matmul.linear import uses_own_products
from meshwright.launcher.runfile.tables import RunFile
from meshwright.model.config import ModelConfig
from meshwright.parallel.mesh import Mesh


class Chosen(NamedTuple):
    """The choices of a run, and lines that say where they come from."""

    choices: Choices
    reasons: list[str]


def choices_of_run(stored: dict[str, str], mesh: Mesh, device: torch.device, dtype: torch.dtype) -> Chosen:
    """Return the same choices on every rank; `stored` is what the run's checkpoint holds, empty for a new run.

    Raises:
        ValueError: if the checkpoint's choices are not known to this version.
    """
    if stored:
        return Chosen(choices_from_dict(stored), [])
    if device.type != "cpu" or dtype == torch.float64:
        return Chosen(Choices(), [])
    found = _of_this_machine() if mesh.rank == 0 else None
    if mesh.world.is_split:
        box = [None if found is None else (found.choices.to_dict(), found.reasons)]
        dist.broadcast_object_list(box, src=0, group=mesh.world.group)
        assert box[0] is not None
        return Chosen(choices_from_dict(box[0][0]), box[0][1])
    assert found is not None
    return found


def attention_lines(table: RunFile, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return a line for the log where attention cannot go by a flash operator, what it goes by, and why."""
    is_ring = table.parallel.cp > 1 and table.parallel.context == "ring"
    why = slower_than_flash(device, dtype, table.model.head_dim)
    if why is None or not (is_ring or table.data.mask_documents):
        return []
    if is_ring:
        return [f"ring attention goes by plain products {why}"]
    return [f"attention within documents goes by a mask of all pairs of positions {why}"]


def grouped_lines(model: ModelConfig, etp: int, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return a line for the log where the experts' products cannot go by the grouped operator, and why.

    Where the CPU kernels that are in use go another way by choice, the choice has its own line.
    """
    if model.moe is None or not model.num_moe_layers:
        return []
    if device.type == "cpu" and uses_own_products(torch.empty(0), dtype):
        return []
    why = slower_than_grouped(device, dtype, (model.hidden_size, model.moe.expert_hidden_size // etp))
    return [] if why is None else [why]


def _of_this_machine() -> Chosen:
    path = _cache_folder() / f"kernels-{_machine()}.json"
    if held := _remembered(path):
        return held
    from meshwright.kernels.measure import measure

    measured = measure()
    _remember(path, {"choices": measured.choices.to_dict(), "reasons": measured.reasons})
    # Another run may have measured at the same time: the first to remember is right for both.
    held = _remembered(path)
    if held is None or held.choices == measured.choices:
        return Chosen(measured.choices, [f"CPU kernels: {reason}" for reason in measured.reasons])
    return held


def _remembered(path: Path) -> Chosen | None:
    """Return what was measured earlier, None if that is nothing or of another version."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        return Chosen(choices_from_dict(held["choices"]), [f"CPU kernels as measured earlier ({path})"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(path: Path, content: dict[str, object]) -> None:
    """Write the file whole or not at all, unless a readable one came to be there meanwhile.

    A home that cannot be written to costs a measurement each time.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        try:
            os.link(aside, path)  # unlike a rename, this fails where the file is there
            aside.unlink()
        except OSError:  # it is there, or the file system knows no links
            if _remembered(path):
                aside.unlink()
            else:
                aside.replace(path)
    except OSError:
        return


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "meshwright"


def _machine() -> str:
    """Return 16 hex digits for what is chosen, and what decides it: the processor's model and torch."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    about = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    about += [torch.__version__, torch.backends.cpu.get_cpu_capability(), *Choices().to_dict()]
    return hashlib.blake2b("\n".join(about).encode(), digest_size=8).hexdigest()
