"""How an autograd function is called: with autograd's bookkeeping where a gradient may be asked for, else without.

The bookkeeping costs tens of microseconds, which is much where one token is computed: a generation spends a quarter of
its time there otherwise. The mathematics is the function's own forward either way.
"""

from typing import Any

import torch
from torch import Tensor


class _Nothing:
    """Stands for the context of a function whose backward will not be called."""

    def save_for_backward(self, *tensors: Any) -> None:
        """Keep nothing."""


def applied(function: type[torch.autograd.Function], *inputs: Any) -> Tensor:
    """Return what the function makes of the inputs."""
    if not torch.is_grad_enabled():
        made: Tensor = function.forward(_Nothing(), *inputs)
    else:
        made = function.apply(*inputs)  # type: ignore[no-untyped-call]
    return made
