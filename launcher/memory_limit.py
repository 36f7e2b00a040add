"""Whether a rank's state can be held at all, asked before anything is allocated.

A run whose weights, gradients and moments alone exceed the memory would end in the middle of being built, killed by
the system without a word. Activations come on top, so that passing is no promise.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from meshwright.launcher.runfile.cross_checks import check
from meshwright.launcher.runfile.footprint import state_bytes
from meshwright.launcher.runfile.messages import ConfigError
from meshwright.launcher.runfile.tables import RunFile
from meshwright.launcher.runfile.would_fit import with_keys

_GIB = 2**30


def check_memory(run_file: RunFile, device: torch.device, world_size: int, local_ranks: int) -> None:
    """Refuse a run of which one rank's state is larger than the memory that it has.

    Raises:
        ConfigError: with both sizes and the ZeRO stages that would fit, of those that the run's schedule takes.
    """
    if device.type == "cuda":
        limit, where = float(torch.cuda.get_device_properties(device).total_memory), "on its GPU"
    else:
        host = host_bytes()
        limit = host / local_ranks
        where = f"({host / _GIB:.1f} GiB for {local_ranks} rank{'s' if local_ranks > 1 else ''})"
    needs = state_bytes(run_file, world_size).total
    if needs <= limit:
        return
    others = {stage: with_keys(run_file, "zero", stage=stage) for stage in (1, 2, 3)}
    sound = {stage: other for stage, other in others.items() if not check(other, world_size)}
    stages = [stage for stage, other in sound.items() if state_bytes(other, world_size).total <= limit]
    most = max(sound, default=run_file.zero.stage)
    fits = f"zero.stage = {stages[0]}" if stages else f"more ranks with zero.stage = {most}, or a smaller model,"
    raise ConfigError(
        "[model]",
        [
            f"weights, gradients and moments take {needs / _GIB:.1f} GiB on each rank, "
            f"and it has {limit / _GIB:.1f} GiB {where}; {fits} would fit"
        ],
    )


def host_bytes() -> int:
    """Return this machine's memory, or the smallest of the limits that a container or a job sets on this process."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *_cgroup_limits(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))])


def _cgroup_limits(root: Path, own: Path) -> Iterator[int]:
    """Yield the memory limits of this process's control group and of those that it lies in, versions 1 and 2."""
    try:
        lines = own.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folder, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            folder, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        inner = folder / path.lstrip("/")
        for group in (inner, *inner.parents):
            try:
                text = (group / name).read_text(encoding="ascii").strip()
            except OSError:
                continue
            if text.isdigit():  # "max" is no limit
                yield int(text)
            if group == folder:
                break
