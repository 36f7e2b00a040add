"""Split linear layers give what one device gives: outputs and gradients, biases once, copies of heads summed."""

import pytest
import torch
from rank_pool import run_mesh
from torch import Tensor, nn

from meshwright.parallel.collectives import all_reduce, gather
from meshwright.parallel.initialise import InitRule
from meshwright.parallel.mesh import Axis, Mesh, Sizes
from meshwright.parallel.tensor.linear import ColumnLinear, RowLinear

S, B, H, F = 8, 3, 6, 20  # all different, so that a swapped dim cannot pass unseen
RULE = InitRule("normal", 1.0)


def whole_linear(i: int, o: int) -> nn.Linear:
    torch.manual_seed(i * 100 + o)  # the same on every rank: each cuts its part from the same whole
    return nn.Linear(i, o, dtype=torch.float64)


def put(layer: ColumnLinear | RowLinear, whole: nn.Linear) -> None:
    for name, placement in layer.placements().items():
        held: Tensor = getattr(layer, name)
        part: Tensor = getattr(whole, name).detach()
        for split in placement.splits:
            part = part.chunk(split.parts, dim=split.dim)[split.index]
        held.data = part.clone()


def gradient_error(layer: ColumnLinear | RowLinear, whole: nn.Linear) -> float:
    errors = []
    for name, placement in layer.placements().items():
        gradient, expected = getattr(layer, name).grad.clone(), getattr(whole, name).grad
        for axis in placement.grad_sum:
            all_reduce(gradient, axis)
        for split in placement.splits:
            expected = expected.chunk(split.parts, dim=split.dim)[split.index]
        errors.append((gradient - expected).abs().max().item())
    return max(errors)


def a_pair_of_layers(mesh: Mesh) -> tuple[float, float, float]:
    tp = mesh.tp
    inner, outer = whole_linear(H, F), whole_linear(F, H)
    column = ColumnLinear(H, F, rule=RULE, bias=True, tp=tp)
    row = RowLinear(F, H, rule=RULE, bias=True, tp=tp)
    put(column, inner)
    put(row, outer)
    torch.manual_seed(7)
    x, above = torch.randn(2, S, B, H, dtype=torch.float64)
    x.requires_grad_()
    held = x.detach().chunk(tp.size)[tp.rank].clone().requires_grad_()
    expected = outer(torch.tanh(inner(x)))
    expected.backward(above)
    y = row(torch.tanh(column(gather(held, tp))))
    y.backward(above.chunk(tp.size)[tp.rank])
    assert held.grad is not None
    assert x.grad is not None
    of_y = (y - expected.chunk(tp.size)[tp.rank]).abs().max().item()
    of_x = (held.grad - x.grad.chunk(tp.size)[tp.rank]).abs().max().item()
    return of_y, of_x, max(gradient_error(column, inner), gradient_error(row, outer))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_column_and_a_row_layer_are_one_devices(tp: int) -> None:
    for errors in run_mesh(Sizes(tp=tp), a_pair_of_layers):
        assert max(errors) < 1e-12  # fp64 sums of 20 products in another order


def copied_heads(mesh: Mesh, copies: int) -> float:
    whole = whole_linear(H, 4)
    neighbours = mesh.neighbours(copies)
    layer = ColumnLinear(H, 4, rule=RULE, bias=True, tp=mesh.tp, copies=neighbours)
    put(layer, whole)
    torch.manual_seed(3)
    x = torch.randn(S, B, H, dtype=torch.float64)
    # Each copy is used with other queries: its gradient is a part, and the parts of the copies add up.
    above = torch.randn(copies, S, B, 4, dtype=torch.float64)
    whole(x).backward(above.sum(0))
    mine = above[mesh.tp.rank % copies].chunk(mesh.tp.size // copies, dim=2)[mesh.tp.rank // copies]
    layer(x).backward(mine)
    return gradient_error(layer, whole)


@pytest.mark.parametrize(("tp", "copies"), [(2, 2), (4, 2), (4, 4)])
def test_gradients_of_copies_are_summed_over_those_that_hold_them(tp: int, copies: int) -> None:
    assert max(run_mesh(Sizes(tp=tp), copied_heads, copies)) < 1e-12


def neighbours_of(mesh: Mesh, copies: int) -> tuple[int, ...]:
    return mesh.neighbours(copies).ranks


def test_neighbours_are_stretches_of_tp() -> None:
    assert run_mesh(Sizes(dp_shard=2, tp=4), neighbours_of, 2) == [(r // 2 * 2, r // 2 * 2 + 1) for r in range(8)]
    assert run_mesh(Sizes(tp=2), neighbours_of, 2) == [(0, 1)] * 2


def test_uneven_splits_name_the_numbers() -> None:
    with pytest.raises(ValueError, match="out_features = 10 does not divide by tp / copies = 4"):
        ColumnLinear(8, 10, rule=RULE, tp=Axis("tp", 4))
    with pytest.raises(ValueError, match="in_features = 10 does not divide by tp = 4"):
        RowLinear(10, 8, rule=RULE, tp=Axis("tp", 4))
