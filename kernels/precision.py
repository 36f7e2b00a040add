"""In which dtype a kernel computes: at least fp32 for sums, autocast's dtype for products.

torch's autocast casts the inputs of its own operators only. Our kernels call private operators and autograd
functions that it does not know, so each asks here what autocast would have done:

    inside torch.autocast(device, bfloat16)     fp32 -> bf16    fp64 stays    bf16 stays
    outside                                     the dtypes stay
"""

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """Return x if it is in fp32 or fp64, else x in fp32: sums are made in no less, and fp64 stays exact."""
    return x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Return the dtype that autocast gives to products on this kind of device, or None when it is off."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast the inputs of a product as autocast would: to its dtype where it is on, but never from fp64."""
    dtype = autocast_dtype(tensors[0].device.type)
    if dtype is None:
        return tensors
    return tuple(x if x.dtype in (dtype, torch.float64) else x.to(dtype) for x in tensors)
