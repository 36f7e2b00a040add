"""The chunked scan of Mamba-2 is its recurrence, one token at a time: outputs, states and gradients."""

import pytest
import torch
from torch import Tensor
from twins import leaf

from meshwright.kernels.states import reference
from meshwright.kernels.states import ssd as module
from meshwright.kernels.states.ssd import ssd, ssd_summary
from meshwright.kernels.states.ssd_step import ssd_step

S, B, N, D, G, STATE = 11, 2, 6, 3, 2, 5
F64 = torch.float64


def inputs(dtype: torch.dtype = F64, groups: int = G, s: int = S) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {
        "x": leaf(s, B, N, D, dtype=dtype),
        "dt": torch.rand(s, B, N, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_(),
        "a": (-3 * torch.rand(N, dtype=torch.promote_types(dtype, torch.float32))).requires_grad_(),
        "b": leaf(s, B, groups, STATE, dtype=dtype),
        "c": leaf(s, B, groups, STATE, dtype=dtype),
        "skip": leaf(N, dtype=torch.promote_types(dtype, torch.float32)),
    }


def begins_of(s: int = S) -> Tensor:
    begins = torch.zeros(s, B, dtype=torch.bool)
    begins[[0, 4, 5], 0], begins[[7, 10], 1] = True, True
    return begins


def assert_same(given: dict[str, Tensor], chunk_size: int, **named: Tensor | None) -> None:
    ours, theirs = ssd(**given, **named, chunk_size=chunk_size), reference.ssd(**given, **named)
    of = [x for x in (*given.values(), *named.values()) if x is not None and x.requires_grad]
    above = [torch.randn_like(each) for each in theirs]
    found, wanted = (torch.autograd.grad(results, of, above) for results in (ours, theirs))
    for mine, its in zip((*ours, *found), (*theirs, *wanted), strict=True):
        assert mine.dtype == its.dtype
        # In fp32 a sum of forty tokens is as exact as its largest terms, which may cancel.
        atol = None if its.dtype == F64 else 2e-6 * its.abs().max().item()
        torch.testing.assert_close(mine, its, atol=atol, rtol=None if atol is None else 0.0)


@pytest.mark.parametrize("chunk_size", [1, 4, S, 64])
@pytest.mark.parametrize("begins", [None, begins_of()])
def test_the_chunked_scan_is_the_recurrence(chunk_size: int, begins: Tensor | None) -> None:
    assert_same(inputs(), chunk_size, begins=begins)


@pytest.mark.parametrize("groups", [1, N])
def test_a_state_may_come_in_and_heads_may_share_any_way(groups: int) -> None:
    state = leaf(B, N, D, STATE, dtype=F64)
    assert_same(inputs(groups=groups), 4, begins=begins_of(), initial_state=state)
    assert_same(inputs(groups=groups), 4, initial_state=state)


@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, G, N])
def test_one_token_more_is_a_step_of_the_recurrence(groups: int, dtype: torch.dtype) -> None:
    given = inputs(dtype, groups, s=1)
    state = leaf(B, N, D, STATE, dtype=torch.promote_types(dtype, torch.float32))
    before = state.detach().clone()
    found = ssd_step(*given.values(), state)
    for mine, its in zip(found, reference.ssd(**given, initial_state=state), strict=True):
        assert mine.dtype == its.dtype
        torch.testing.assert_close(mine, its)
    torch.testing.assert_close(state, before)


@pytest.mark.parametrize("at_once", [2, 3])
def test_chunks_may_be_multiplied_together(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = module.stretches
    monkeypatch.setattr(module, "stretches", lambda s, size, _: plain(s, size, at_once))
    assert_same(inputs(), 2, begins=begins_of(), initial_state=leaf(B, N, D, STATE, dtype=F64))


def test_in_fp32_it_is_the_recurrence_too() -> None:
    assert_same(inputs(torch.float32, s=40), 16, begins=begins_of(40))


def test_in_bf16_only_inputs_and_outputs_are_rounded() -> None:
    given = inputs(torch.bfloat16, s=40)
    wide = {name: x.detach().double() for name, x in given.items()}
    y, state = ssd(**given, chunk_size=16)
    wanted, wanted_state = reference.ssd(**wide)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), wanted, rtol=2**-8, atol=1e-5)  # one rounding
    torch.testing.assert_close(state.double(), wanted_state, rtol=1e-4, atol=1e-5)


def test_gradients_agree_with_differences() -> None:
    given = inputs(s=5)
    named = {"begins": begins_of(11)[3:8], "initial_state": leaf(B, N, D, STATE, dtype=F64), "chunk_size": 2}
    names = [*given, "initial_state"]

    def scan(*values: Tensor) -> tuple[Tensor, Tensor]:
        return ssd(**{**named, **dict(zip(names, values, strict=True))})

    assert torch.autograd.gradcheck(scan, (*given.values(), named["initial_state"]), fast_mode=True)


def test_very_fast_decay_neither_overflows_nor_leaks() -> None:
    given = inputs(torch.float32, s=64)
    given["dt"] = (given["dt"].detach() + 5.0).requires_grad_()
    given["a"] = torch.full((N,), -16.0).requires_grad_()  # exp(5000) in a chunk, if it were divided by
    y, _ = ssd(**given, chunk_size=64)
    grads = torch.autograd.grad(y.sum(), [*given.values()])
    assert all(torch.isfinite(x).all() for x in (y, *grads))


@pytest.mark.parametrize("begins", [None, begins_of()])
def test_a_summary_does_to_a_state_what_the_tokens_do(begins: Tensor | None) -> None:
    given, state = inputs(), leaf(B, N, D, STATE, dtype=F64)
    shared = {name: given[name] for name in ("x", "dt", "a", "b")}
    decay, added = ssd_summary(**shared, begins=begins)
    ours = decay[..., None, None] * state + added
    _, theirs = reference.ssd(**given, begins=begins, initial_state=state)
    of, above = [*shared.values(), state], torch.randn_like(theirs)
    torch.testing.assert_close(ours, theirs)
    for mine, its in zip(torch.autograd.grad(ours, of, above), torch.autograd.grad(theirs, of, above), strict=True):
        torch.testing.assert_close(mine, its)


def test_kept_for_the_backward_are_the_inputs_and_one_state_a_chunk() -> None:
    given, sizes = inputs(torch.float32, s=64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        ssd(**given, chunk_size=16)
    states = 5 * B * N * D * STATE  # before each of four chunks, and after the last
    assert sum(sizes) == sum(x.numel() for x in given.values()) + states


def test_groups_that_do_not_divide_the_heads_are_refused() -> None:
    given = inputs(groups=4)
    with pytest.raises(ValueError, match="num_heads = 6 does not divide by num_groups = 4"):
        ssd(**given, chunk_size=4)
    with pytest.raises(ValueError, match="chunk_size = 0 must be at least 1"):
        ssd(**inputs(), chunk_size=0)
