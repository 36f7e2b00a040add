"""In which dtype a kernel computes: at least fp32 for sums, autocast's dtype for products.

torch's autocast casts the inputs of its own operators only. Our kernels call private operators and autograd
functions that it does not know, so each asks here what autocast would have done:

    inside torch.autocast(device, bfloat16)     fp32 -> bf16    fp64 stays    bf16 stays
    outside                                     the dtypes stay
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """Return x if it is in fp32 or fp64, else x in fp32: sums are made in no less, and fp64 stays exact."""
    return x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)


def result_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that a product with x has: autocast's where it is on, but fp64 stays."""
    device = x.device.type
    if x.dtype != torch.float64 and _is_on(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast the inputs of a product as autocast would: to its dtype where it is on, but never from fp64."""
    dtype = result_dtype(tensors[0])
    if not _is_on(tensors[0].device.type):
        return tensors
    return tuple(x if x.dtype in (dtype, torch.float64) else x.to(dtype) for x in tensors)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which products keep the dtypes that a kernel has chosen for them."""
    # Entering a context costs as much as a small product.
    return torch.autocast(x.device.type, enabled=False) if _is_on(x.device.type) else nullcontext()


def _is_on(device: str) -> bool:
    # Tensors without numbers, of which only shapes are asked, know no autocast: torch would refuse the question.
    return device != "meta" and torch.is_autocast_enabled(device)
