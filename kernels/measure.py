"""Time the ways that `choose.py` knows on this CPU, and choose; takes a fraction of a second.

    measured = measure()
    use(measured.choices)
    print(*measured.reasons, sep="\\n")         fp32 x W^T: mkl 4.6 ms, onednn 4.9 ms -> mkl

The sizes are of a small model's layer; with fewer rows the libraries that multiply look more alike than they are. Time
is the processor's, on one thread: on a busy machine the clock on the wall, and threads that wait for each other, say
little. The contenders take turns and each counts with its fastest; PyTorch's own way is left only for one that is
faster by a margin, so that noise does not decide. fp64 is never asked.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meshwright.kernels.attention.attention import attention
from meshwright.kernels.choose import LONG, Choices, choices_from_dict, current, use
from meshwright.kernels.matmul import products
from meshwright.kernels.matmul.linear import linear

MARGIN = 1.05
"""How much faster than PyTorch's own way another must be: a library that was 1.1 times as fast at products alone, on
one thread, made whole steps on two threads 1.04 to 1.1 times as fast (docs/measured/architectures.md)."""
TURNS = 4
HOPELESS = 5.0
"""A way whose first turn takes so many times the fastest one's gets no other."""


@dataclass(frozen=True)
class Measured:
    """What was chosen, and for each choice a line that says why."""

    choices: Choices
    reasons: list[str]


@dataclass(frozen=True)
class _Contest:
    """A field of `Choices`, its ways (PyTorch's own first), and work that goes by it."""

    field: str
    what: str
    ways: tuple[str, ...]
    work: Callable[[], Any]


def measure() -> Measured:
    """Time every way on one thread of this CPU; the choices in use stay as they are.

    A contest is held under the choices of those before it: bf16 products in fp32 go by the library chosen for fp32.
    """
    before, threads, chosen = current(), torch.get_num_threads(), Choices()
    reasons = []
    torch.set_num_threads(1)
    try:
        for contest in _contests():
            took = _times(contest, chosen)
            chosen = _with(chosen, contest.field, _winner(took))
            listed = ", ".join(f"{way} {seconds * 1e3:.1f} ms" for way, seconds in took.items())
            reasons.append(f"{contest.what}: {listed} -> {_winner(took)}")
    finally:
        torch.set_num_threads(threads)
        use(before)
    return Measured(chosen, reasons)


def _contests() -> Iterator[_Contest]:
    x, weight, grad = torch.randn(2048, 512), torch.randn(512, 512), torch.randn(2048, 512)
    libraries = ("mkl", "onednn") if onednn_agrees() else ("mkl",)
    yield _Contest("fp32_output", "fp32 x W^T", libraries, lambda: products.output(x, weight))
    yield _Contest("fp32_input_gradient", "fp32 g W", libraries, lambda: products.input_gradient(grad, weight))
    yield _Contest("fp32_weight_gradient", "fp32 g^T x", libraries, lambda: products.weight_gradient(grad, x))

    bf16 = torch.bfloat16
    rows, matrix = _inputs([(512, 256), (256, 256)], bf16)
    yield _Contest("bf16_products", "bf16 linear", ("native", "fp32"), lambda: _both_ways(linear, rows, matrix))
    short, long = (512, 1, 8, 64), (LONG, 1, 1, 64)  # of few heads: a second way in bf16 may be 40 times slower
    for shape, name, what in ((short, "attention", "attention"), (long, "long_attention", f"attention of {LONG}")):
        for dtype, of, ways in (
            (torch.float32, "fp32", ("flash", "blocks")),
            (bf16, "bf16", ("flash", "blocks", "blocks_fp32")),
        ):
            q, k, v = _inputs([shape] * 3, dtype)
            work = lambda q=q, k=k, v=v: _both_ways(attention, q, k, v)  # noqa: E731
            yield _Contest(f"{of}_{name}", f"{of} {what}", ways, work)


def onednn_agrees() -> bool:
    """Say whether this torch has oneDNN's linear operator and it multiplies as MKL does."""
    x, weight = torch.randn(64, 48), torch.randn(32, 48)
    try:
        return bool(torch.allclose(products.onednn_product(x, weight), x @ weight.t(), rtol=1e-4, atol=1e-4))
    except (AttributeError, RuntimeError):
        return False


def _times(contest: _Contest, chosen: Choices) -> dict[str, float]:
    """Return the fastest turn of each way, in seconds."""
    took: dict[str, float] = {}
    if len(contest.ways) == 1:
        return {contest.ways[0]: 0.0}
    for turn in range(1 + TURNS):
        for way in contest.ways:
            if turn > 0 and took[way] > HOPELESS * min(took.values()):
                continue
            use(_with(chosen, contest.field, way))
            begin = time.thread_time()
            contest.work()
            seconds = time.thread_time() - begin
            took[way] = min(seconds, took.get(way, seconds))
    return took


def _with(choices: Choices, field: str, way: str) -> Choices:
    return choices_from_dict(choices.to_dict() | {field: way})


def _winner(took: dict[str, float]) -> str:
    own = next(iter(took))
    fastest = min(took, key=lambda way: took[way])
    return fastest if took[fastest] * MARGIN < took[own] else own


def _inputs(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def _both_ways(kernel: Callable[..., Tensor], *inputs: Tensor) -> None:
    torch.autograd.grad(kernel(*inputs).sum(), inputs)
