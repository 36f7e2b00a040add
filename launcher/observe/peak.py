"""What a rank's device could do at best: the denominator of MFU, always with its name.

    a GPU of the table         its dense bf16 peak, whatever the run's precision
    a CPU, another device      a ceiling measured here, once, in the dtype of the run's products: the best rate
                               of torch.mm and of our own linear over growing square matrices

The published figures of recent GPUs are often quoted with 2:4 sparsity, which no training uses: that is twice the
number here. Where ranks share a CPU they measure at the same time, so each measures its own share of it.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from meshwright.kernels.matmul.linear import linear

# Words that must all stand in the device's name, and dense bf16 FLOP/s by the vendor's data sheet. The first row that
# fits counts, so a variant stands before its family. A device that is not here is measured.
PEAKS: tuple[tuple[str, float], ...] = (
    ("GB300", 2500e12),
    ("GB200", 2500e12),
    ("B300", 2250e12),
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX A6000", 154.8e12),
    ("RTX 5090", 209.5e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71.2e12),
    ("MI325X", 1307.4e12),
    ("MI300X", 1307.4e12),
    ("MI250X", 191.5e12),  # one of the card's two dies: each is a device of its own
)

_SIZES = (256, 512, 1024, 2048, 4096, 8192)
_FEWEST_RUNS, _MOST_RUNS = 3, 8  # the fewest also where time is up: one alone may have met a busy machine
_LONG_ENOUGH = 0.02  # seconds for one product: beyond it a larger one is no faster


@dataclass(frozen=True)
class Peak:
    """The FLOP/s of one rank's device at best, and where that number comes from."""

    flops: float
    name: str


def choose_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """Return the denominator of MFU for one rank on this device."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        published = published_peak(name)
        if published is not None:
            return Peak(published, f"{name} dense bf16 peak {_tera(published)}")
    return measured_peak(device, dtype)


def published_peak(device_name: str) -> float | None:
    """Return the dense bf16 FLOP/s of a GPU by the name that its driver gives, or None for an unknown one."""
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    return next((flops for name, flops in PEAKS if set(name.upper().split()) <= words), None)


def measured_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> Peak:
    """Return the best rate of a matrix product on this device, found in about so many seconds."""
    products: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (torch.mm, linear)
    until, best = time.perf_counter() + seconds, 0.0
    with torch.no_grad():
        for size in _SIZES:
            x, y = torch.randn(2, size, size).to(device, dtype).unbind()
            took = min(_fastest(product, x, y, until) for product in products)
            best = max(best, 2 * size**3 / took)
            if took > _LONG_ENOUGH or (time.perf_counter() >= until and size > _SIZES[0]):
                break
    threads = torch.get_num_threads()
    where = f"{threads} CPU thread{'s' if threads > 1 else ''}" if device.type == "cpu" else str(device)
    dtype_name = str(dtype).removeprefix("torch.")
    return Peak(best, f"measured {dtype_name} matrix product on {where} {_tera(best)}")


def _fastest(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, until: float) -> float:
    """Return the seconds of the fastest of a few products, after a first one that is not timed."""
    product(x, y)
    took = float("inf")
    for run in range(1, _MOST_RUNS + 1):
        synchronize(x.device)
        began = time.perf_counter()
        product(x, y)
        synchronize(x.device)
        ended = time.perf_counter()
        took = min(took, ended - began)
        if run >= _FEWEST_RUNS and ended >= until:
            break
    return took


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _tera(flops: float) -> str:
    return f"{flops / 1e12:.4g} TFLOP/s"
