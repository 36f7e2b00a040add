"""Let a process keep the memory that it frees, instead of giving it back to the system after each large tensor.

glibc maps each large block anew and unmaps it when it is freed: the kernel then hands out zeroed pages at every step
of training (`docs/measured/` holds what that costs). Variables tell glibc otherwise, but it reads them only when a
process starts; so local ranks are started with them, and a process that is a rank already starts itself once more, in
place, before it has loaded anything heavy. Other C libraries ignore the variables.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

# Blocks up to 1 GiB come from the heap, and the heap's end is given back only above 16 GiB of free memory.
KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
_RESTARTED = "MESHWRIGHT_RESTARTED"


def with_kept_memory(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` with what glibc needs to keep memory; what the user set for it stays as it is."""
    if "GLIBC_TUNABLES" in environment:
        return dict(environment)
    return KEPT_MEMORY | dict(environment)


def restart_with_kept_memory() -> None:
    """Start this process once more with the variables set: same process id, same arguments; then return at once.

    Does nothing in a program that only uses Meshwright as a library, and where torch is loaded already.
    """
    wanted = with_kept_memory(os.environ)
    if wanted == dict(os.environ) or os.environ.get(_RESTARTED) or not _is_our_command() or "torch" in sys.modules:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, command_again(), wanted | {_RESTARTED: "1"})


def command_again() -> list[str]:
    """Return the command line that starts this very command again."""
    return [sys.executable, *sys.orig_argv[1:]]


def _is_our_command() -> bool:
    """Say whether this process was started as `meshwright ...` or `python -m meshwright.launcher ...`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return Path(sys.argv[0]).name == "meshwright" or (spec is not None and spec.name == "meshwright.launcher.__main__")
