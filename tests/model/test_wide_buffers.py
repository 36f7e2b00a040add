"""What routers move by small steps stays in fp32 when weights are turned into a narrower type."""

import pytest
import torch

from meshwright.model.feedforward.experts import Experts
from meshwright.model.feedforward.moe import Moe, RouterLosses
from meshwright.model.parts import initialise
from meshwright.model.routers.router import Ways
from meshwright.model.routers.table import make_router

H, E = 6, 8


def part(kind: str) -> Moe:
    router = make_router(kind, H, E, 2, Ways(bias_rate=0.001))
    made = Moe(router, Experts(H, 4, E), losses=RouterLosses("step", 0.01))
    initialise(made, seed=0)
    return made


@pytest.mark.parametrize("kind", ["sigmoid", "expert_choice"])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_buffers_keep_their_type_and_every_bit(kind: str, narrow: torch.dtype) -> None:
    made = part(kind)
    made.router.finish_step({"moe.load": torch.arange(E).double(), "moe.passed": torch.full((E,), 3.0)})
    before = {name: buffer.clone() for name, buffer in made.named_buffers()}
    assert len(before) == 2
    made.to(narrow)
    assert made.router.weight.dtype == narrow
    for name, buffer in made.named_buffers():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, before[name])
    assert all(buffer.dtype == torch.float64 for buffer in made.to(torch.float64).buffers())
    assert {buffer.device.type for buffer in made.to("meta").buffers()} == {"meta"}


@pytest.mark.parametrize("kind", ["sigmoid", "expert_choice"])
def test_buffers_are_made_in_fp32_whatever_the_usual_type_is(kind: str) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert [buffer.dtype for buffer in part(kind).buffers()] == [torch.float32] * 2
    finally:
        torch.set_default_dtype(torch.float32)
