"""What this machine lacks for a run, told before any rank is started; asks the driver and the packages, loads no torch.

`meshwright check` is for any machine and does not ask. What only torch can tell, each rank tells (launcher/build.py).
"""

import ctypes
import importlib.util
from contextlib import suppress

from meshwright.launcher.runfile.messages import problem
from meshwright.launcher.runfile.tables import RunFile


def problems_here(run_file: RunFile) -> list[str]:
    """Return every reason why ranks on this machine could not run this; empty means that none was found."""
    if run_file.parallel.expert_exchange != "deep_ep":
        return []
    rules = []
    if count_gpus() == 0:
        rules.append("runs on NVIDIA GPUs, and CUDA finds none on this machine")
    if importlib.util.find_spec("deep_ep") is None:
        rules.append("the package deep_ep is not installed on this machine")
    if not rules:
        return []
    return [problem("parallel.expert_exchange", "deep_ep", "; ".join(rules), '"all_to_all" would fit')]


def count_gpus() -> int:
    """Return how many GPUs CUDA offers to this process, which CUDA_VISIBLE_DEVICES narrows; 0 without a driver."""
    count = ctypes.c_int(0)
    with suppress(OSError, AttributeError):
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuInit(0) == 0:
            driver.cuDeviceGetCount(ctypes.byref(count))
    return count.value
