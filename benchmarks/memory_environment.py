"""The environment of a process whose memory glibc keeps, or gives back as it usually does."""

import os

from meshwright.launcher.kept_memory import KEPT_MEMORY


def environment_with(*, kept: bool) -> dict[str, str]:
    """Return this process's environment with glibc told what the launcher tells its ranks, or told nothing."""
    told_nothing = {k: v for k, v in os.environ.items() if k not in (*KEPT_MEMORY, "GLIBC_TUNABLES")}
    return told_nothing | (KEPT_MEMORY if kept else {})
