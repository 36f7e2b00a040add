"""Ranks that end when the process that started them does, also when that was killed: asked of the kernel (Linux)."""

import ctypes
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def end_with_parent(number: int) -> Callable[[], object] | None:
    """Return what a child calls to be sent this signal when its parent ends; None where the kernel does not offer it.

    Called before the fork, because after it only a plain call is safe.
    """
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(_PR_SET_PDEATHSIG, number)
