"""Hold a kernel to its twin in kernels/reference.py: outputs, and the gradients of every input that has one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# torch's own defaults for fp32 and fp64. In bf16 a kernel rounds between its steps, and torch's own sum the rounded
# parts of several heads, by 2^-9 each time; its twin rounds once. It is held to six such steps of the largest number.
BF16_STEPS = 6 * 2.0**-9


def assert_like_twin(
    kernel: Callable[..., Tensor], twin: Callable[..., Tensor], inputs: list[Any], **named: Any
) -> None:
    """Compare results and gradients for a random gradient from above."""
    result, expected = kernel(*inputs, **named), twin(*inputs, **named)
    assert result.dtype == expected.dtype
    assert_near(result, expected)
    of = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    above = torch.randn_like(expected)
    pairs = zip(torch.autograd.grad(result, of, above), torch.autograd.grad(expected, of, above), strict=True)
    for gradient, wanted in pairs:
        assert gradient.dtype == wanted.dtype
        assert_near(gradient, wanted)


def assert_near(result: Tensor, expected: Tensor) -> None:
    """Compare as the dtype allows."""
    if result.dtype == torch.bfloat16:
        largest = expected.abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(result, expected, rtol=0.0, atol=BF16_STEPS * largest)
    else:
        torch.testing.assert_close(result, expected)


def leaf(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Return a random tensor that wants a gradient."""
    return (torch.randn(*shape, dtype=dtype) * scale).requires_grad_()
