"""Mixers that carry a state: more ranks than groups, narrow types, what is kept of them."""

import pytest
import torch
from mixer_parity import documents, errors_on, randomised, too_far, where_of
from rank_pool import run_mesh
from torch import Tensor, nn

from meshwright.model.mixers.gated_delta import DeltaSizes, DeltaSpread, GatedDelta
from meshwright.model.mixers.mamba1 import Mamba1, Mamba1Sizes
from meshwright.model.mixers.mamba2 import Mamba2, Mamba2Sizes, Spread
from meshwright.model.mixers.s4d import S4d, S4dSizes
from meshwright.parallel.mesh import Axis, Mesh, Sizes, single_process_mesh
from meshwright.parallel.recompute.policy import recompute_layers
from meshwright.parallel.tally import Tally

S, H = 24, 6


def mamba2(mesh: Mesh, groups: int = 1, heads: int = 4) -> nn.Module:
    spread = Spread(mesh.tp, mesh.neighbours(max(mesh.tp.size // groups, 1)), mesh.cp)
    sizes = Mamba2Sizes(num_heads=heads, head_dim=3, num_groups=groups, state_size=5, conv_kernel=3, chunk_size=4)
    return Mamba2(H, sizes, bias=groups == 1, conv_bias=groups == 1, spread=spread)


def mamba2_two_groups(mesh: Mesh) -> nn.Module:
    return mamba2(mesh, groups=2)


def mamba1(mesh: Mesh) -> nn.Module:
    sizes = Mamba1Sizes(inner_size=8, dt_rank=3, state_size=5, conv_kernel=3, chunk_size=4)
    return Mamba1(H, sizes, bias=True, tp=mesh.tp, cp=mesh.cp)


def gated_delta(mesh: Mesh) -> nn.Module:
    spread = DeltaSpread(mesh.tp, mesh.neighbours(max(mesh.tp.size // 2, 1)), mesh.cp)
    return GatedDelta(H, DeltaSizes(4, 2, key_head_dim=5, value_head_dim=3, conv_kernel=3, chunk_size=4), spread=spread)


def s4d(mesh: Mesh) -> nn.Module:
    return S4d(H, S4dSizes(state_size=6, chunk_size=5), tp=mesh.tp, cp=mesh.cp)


MAKE = {
    "mamba2": mamba2,
    "mamba2, two groups": mamba2_two_groups,
    "mamba1": mamba1,
    "gated delta": gated_delta,
    "s4d": s4d,
}
WITH_CP = [name for name in MAKE if name != "s4d"]


def case(mesh: Mesh, name: str, mask_documents: bool) -> dict[str, float]:
    return errors_on(mesh, MAKE[name], x_of(), documents(S), mask_documents, True)


MANY = [
    *((Sizes(cp=2), False, name) for name in WITH_CP),
    *((Sizes(cp=3), True, name) for name in WITH_CP),
    *((Sizes(tp=4), False, name) for name in WITH_CP),  # more ranks than groups and key heads
]


@pytest.mark.parametrize(
    ("sizes", "mask_documents", "name"),
    [
        *((Sizes(tp=2), True, name) for name in ("mamba2", "mamba2, two groups")),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in MANY),
    ],
)
def test_a_mixer_on_many_ranks_is_the_whole_one(sizes: Sizes, mask_documents: bool, name: str) -> None:
    assert too_far(run_mesh(sizes, case, name, mask_documents)) == {}


def whole(name: str) -> nn.Module:
    return randomised(MAKE[name](single_process_mesh()).double())


def x_of(s: int = S, seed: int = 1) -> Tensor:
    return torch.randn(s, 2, H, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_sizes_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="num_heads = 4 does not divide by num_groups = 3"):
        mamba2(single_process_mesh(), groups=3)
    with pytest.raises(ValueError, match="num_heads = 4 does not divide by num_key_heads = 3"):
        GatedDelta(H, DeltaSizes(4, 3, 5, 3))
    with pytest.raises(ValueError, match="S4D mixer needs whole samples: cp = 2 is refused; cp = 1 would fit"):
        S4d(H, S4dSizes(), cp=Axis("cp", 2))
    with pytest.raises(ValueError, match="state_size = 5 does not divide by the two of a conjugate pair = 2"):
        S4d(H, S4dSizes(state_size=5))
    with pytest.raises(ValueError, match="inner_size = 9 does not divide by tp = 2"):
        Mamba1(H, Mamba1Sizes(9, 1), tp=Axis("tp", 2))


@pytest.mark.parametrize("name", MAKE)
def test_under_autocast_a_mixer_stays_near_itself(name: str) -> None:
    part = randomised(MAKE[name](single_process_mesh()))
    where, x = where_of(documents(S), single_process_mesh()), x_of().float().requires_grad_()
    wanted = part(x, where, None)
    with torch.autocast("cpu", torch.bfloat16):
        y = part(x, where, None)
    y.float().square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    # Products and what goes between kernels are rounded to 8 bits, 2^-9 each time; what the state sums up is not.
    assert (y - wanted).norm() < 8 * 2**-9 * wanted.norm()
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("name", MAKE)
def test_what_is_selectively_kept_gives_the_same_gradients(name: str) -> None:
    part, x = whole(name), x_of().requires_grad_()
    where = where_of(documents(S), single_process_mesh())
    of = [x, *part.parameters()]
    wanted = torch.autograd.grad(part(x, where, None).square().sum(), of)
    recompute_layers([part], Tally({}), ["matmul"])
    found = torch.autograd.grad(part(x, where, None).square().sum(), of)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)
