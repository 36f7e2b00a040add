"""Split linear layers give what one device gives: outputs and gradients, biases once, copies of heads summed."""

import pytest
import torch
from rank_pool import run_mesh
from torch import Tensor, nn

from meshwright.kernels.limits import MANY_TOKENS, NARROW
from meshwright.parallel.collectives import all_reduce, gather
from meshwright.parallel.initialise import InitRule
from meshwright.parallel.mesh import NO_TP, Axis, Mesh, Sizes
from meshwright.parallel.tensor.linear import ColumnLinear, RowLinear, column_products

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


# Of which the second and the fifth are narrow and without a bias, and the third is as narrow with one.
WIDTHS = (NARROW + 1, NARROW, 7, 2 * NARROW, 5)


def column_layers() -> list[ColumnLinear]:
    torch.manual_seed(2)
    layers = [ColumnLinear(H, width, rule=RULE, bias=width == 7).double() for width in WIDTHS]
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
    return layers


def memories(results: list[Tensor]) -> list[int]:
    """Return for each result the first one that lies in the same memory."""
    begins = [result.untyped_storage().data_ptr() for result in results]
    return [begins.index(begin) for begin in begins]


@pytest.mark.parametrize("tokens", [(MANY_TOKENS // 4, 4), (MANY_TOKENS // 4, 5), (MANY_TOKENS // 4 - 1, 4)])
@pytest.mark.parametrize("joins_narrow", [False, True])
def test_joined_products_are_those_of_the_layers(tokens: tuple[int, int], joins_narrow: bool) -> None:
    layers, alone = column_layers(), column_layers()
    torch.manual_seed(5)
    x = torch.randn(*tokens, H, dtype=torch.float64, requires_grad=True)
    x_alone = x.detach().clone().requires_grad_()
    results = column_products(x, layers, NO_TP, joins_narrow=joins_narrow)
    wanted = [layer(x_alone) for layer in alone]
    is_joined = joins_narrow and tokens[0] * tokens[1] >= MANY_TOKENS
    assert memories(results) == ([0, 1, 2, 3, 1] if is_joined else [0, 1, 2, 3, 4])
    above = [torch.randn_like(each) for each in wanted]
    torch.autograd.backward(results, above)
    torch.autograd.backward(wanted, above)
    # fp64 sums in another order: of six products each, of a thousand tokens, of 500 outputs.
    for found, expected in zip(results, wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, x_alone.grad, rtol=1e-12, atol=1e-10)
    for layer, expected in zip(layers, alone, strict=True):
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(parameter.grad, expected.get_parameter(name).grad, rtol=1e-12, atol=1e-10)


def test_one_narrow_layer_has_nobody_to_join() -> None:
    layers = column_layers()[:4]
    x = torch.randn(MANY_TOKENS, 1, H, dtype=torch.float64)
    assert memories(column_products(x, layers, NO_TP, joins_narrow=True)) == [0, 1, 2, 3]
