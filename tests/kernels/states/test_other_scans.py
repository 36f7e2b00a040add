"""Selective scan, gated delta rule and S4D in chunks are their recurrences: outputs, states and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule
from twins import leaf

from meshwright.kernels.states import reference
from meshwright.kernels.states.gated_delta import gated_delta, gated_delta_summary
from meshwright.kernels.states.s4d import S4dParameters, s4d
from meshwright.kernels.states.selective_scan import selective_scan, selective_summary

S, B, C, N, D, E = 11, 2, 4, 3, 3, 2
F64 = torch.float64
Scan = Callable[..., tuple[Tensor, Tensor]]


def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    return (low + (high - low) * torch.rand(shape, dtype=F64)).requires_grad_()


def of_selective() -> tuple[list[Tensor], Tensor]:
    tensors = [leaf(S, B, C, dtype=F64), uniform(S, B, C), uniform(C, N, low=-3.0), leaf(S, B, N, dtype=F64)]
    return [*tensors, leaf(S, B, N, dtype=F64), leaf(C, dtype=F64)], leaf(B, C, N, dtype=F64)


def of_delta() -> tuple[list[Tensor], Tensor]:
    q, k = (F.normalize(torch.randn(S, B, N, D, dtype=F64), dim=-1).requires_grad_() for _ in range(2))
    values = [leaf(S, B, N, E, dtype=F64), uniform(S, B, N), uniform(S, B, N, low=-2.0, high=0.0)]
    return [q, k, *values], leaf(B, N, D, E, dtype=F64)


def of_s4d() -> tuple[list[Tensor], Tensor]:
    a = torch.complex(-torch.rand(C, N, dtype=F64) - 0.1, torch.randn(C, N, dtype=F64)).requires_grad_()
    c, state = (torch.randn(*shape, N, dtype=torch.complex128).requires_grad_() for shape in ((C,), (B, C)))
    return [leaf(S, B, C, dtype=F64), a, c, uniform(C, low=0.1), leaf(C, dtype=F64)], state


def s4d_of(x: Tensor, a: Tensor, c: Tensor, dt: Tensor, skip: Tensor, **named: Any) -> tuple[Tensor, Tensor]:
    return s4d(x, S4dParameters(a, c, dt, skip), **named)


SCANS: dict[str, tuple[Scan, Scan, Callable[[], tuple[list[Tensor], Tensor]]]] = {
    "selective scan": (selective_scan, reference.selective_scan, of_selective),
    "gated delta": (gated_delta, reference.gated_delta, of_delta),
    "s4d": (s4d_of, reference.s4d, of_s4d),
}


def begins_of() -> Tensor:
    begins = torch.zeros(S, B, dtype=torch.bool)
    begins[[0, 4, 5], 0], begins[[7, 10], 1] = True, True
    return begins


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("chunk_size", [1, 4, S, 64])
@pytest.mark.parametrize("begins", [None, begins_of()])
@pytest.mark.parametrize("with_state", [True, False])
def test_the_chunked_scan_is_the_recurrence(
    name: str, chunk_size: int, begins: Tensor | None, with_state: bool
) -> None:
    torch.manual_seed(4)
    scan, twin, make = SCANS[name]
    inputs, state = make()
    named = {"begins": begins, "initial_state": state if with_state else None}
    ours, theirs = scan(*inputs, **named, chunk_size=chunk_size), twin(*inputs, **named)
    of = [*inputs, state] if with_state else inputs
    above = [torch.randn_like(each) for each in theirs]
    found, wanted = (torch.autograd.grad(results, of, above) for results in (ours, theirs))
    for mine, its in zip((*ours, *found), (*theirs, *wanted), strict=True):
        torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("name", SCANS)
def test_gradients_agree_with_differences(name: str) -> None:
    torch.manual_seed(5)
    scan, _, make = SCANS[name]
    inputs, state = make()

    def both(first: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return scan(*rest, begins=begins_of(), initial_state=first, chunk_size=4)

    assert torch.autograd.gradcheck(both, (state, *inputs), fast_mode=True)


@pytest.mark.parametrize("name", ["selective scan", "gated delta"])
@pytest.mark.parametrize("begins", [None, begins_of()])
def test_a_summary_does_to_a_state_what_the_tokens_do(name: str, begins: Tensor | None) -> None:
    torch.manual_seed(6)
    _, twin, make = SCANS[name]
    inputs, state = make()
    if name == "gated delta":
        shared = inputs[1:]
        turn, added = gated_delta_summary(*shared, begins=begins, chunk_size=4)
        ours = turn @ state + added
    else:
        shared = inputs[:4]
        decay, added = selective_summary(*shared, begins=begins, chunk_size=4)
        ours = decay * state + added
    _, theirs = twin(*inputs, begins=begins, initial_state=state)
    torch.testing.assert_close(ours, theirs)
    of, above = [*shared, state], torch.randn_like(theirs)
    for mine, its in zip(torch.autograd.grad(ours, of, above), torch.autograd.grad(theirs, of, above), strict=True):
        torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("name", ["selective scan", "gated delta"])
def test_in_bf16_only_inputs_and_outputs_are_rounded(name: str) -> None:
    torch.manual_seed(7)
    scan, twin, make = SCANS[name]
    inputs, _ = make()
    narrow = [x.detach().to(torch.bfloat16 if x.dim() > 2 else torch.float32) for x in inputs]
    y, state = scan(*narrow, chunk_size=4)
    wanted, wanted_state = twin(*(x.double() for x in narrow))
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.double(), wanted, rtol=2**-8, atol=1e-5)  # one rounding
    torch.testing.assert_close(state.double(), wanted_state, rtol=1e-4, atol=1e-5)


def test_the_gated_delta_rule_is_that_of_transformers() -> None:
    torch.manual_seed(8)
    (q, k, v, beta, g), state = of_delta()
    y, last = gated_delta(q * D**-0.5, k, v, beta, g, initial_state=state, chunk_size=4)
    theirs, their_last = torch_chunk_gated_delta_rule(
        *(x.transpose(0, 1) for x in (q, k, v)),
        g=g.transpose(0, 1),
        beta=beta.transpose(0, 1),
        chunk_size=4,
        initial_state=state,
        output_final_state=True,
    )
    # transformers computes in fp32.
    torch.testing.assert_close(y, theirs.transpose(0, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, their_last.double(), rtol=1e-5, atol=1e-5)


def test_s4d_is_a_convolution() -> None:
    torch.manual_seed(9)
    (x, a, c, dt, skip), _ = of_s4d()
    y, _ = s4d(x, S4dParameters(a, c, dt, skip), chunk_size=4)
    weight = c * ((a * dt[:, None]).exp() - 1) / a
    powers = (a * dt[:, None])[..., None] * torch.arange(S)
    kernel = 2 * (weight[..., None] * powers.exp()).sum(1).real  # [c, s]
    spectrum = torch.fft.rfft(x.permute(1, 2, 0), 2 * S) * torch.fft.rfft(kernel, 2 * S)
    wanted = torch.fft.irfft(spectrum, 2 * S)[..., :S].permute(2, 0, 1) + skip * x
    torch.testing.assert_close(y, wanted)


@pytest.mark.parametrize("name", SCANS)
def test_kept_for_the_backward_is_no_state_but_those_of_chunks(name: str) -> None:
    scan, _, make = SCANS[name]
    inputs, state = make()
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        scan(*inputs, chunk_size=4)
    if name != "s4d":  # whose tables are kept besides
        assert sum(sizes) <= sum(x.numel() for x in inputs) + 4 * state.numel()
    assert max(sizes) < S * state.numel()
