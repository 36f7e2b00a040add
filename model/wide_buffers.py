"""Buffers that stay in at least fp32, whatever type a module's weights are turned into.

A bias that moves by a thousandth a step stands still in bf16 once it is 0.5; `module.to(torch.bfloat16)`, `half()` and
the like turn buffers as well as weights.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.kernels.precision import at_least_fp32


class WideBuffers(nn.Module):
    """A module whose own buffers are made in fp32 and not narrowed with its weights.

    `load_state_dict(assign=True)` puts other tensors in their place, of whatever type these are.
    """

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> "WideBuffers":
        before: dict[str, Any] = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            now = self._buffers[name]
            if now is not None and now.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = at_least_fp32(buffer.to(now.device))
        return self
