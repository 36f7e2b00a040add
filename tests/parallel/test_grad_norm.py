"""The norm of the whole gradient equals torch's on one process, in every layout; and clipping by it."""

from dataclasses import replace
from math import inf, nan, sqrt

import engine_cases
import pytest
import torch
from rank_pool import run_mesh
from torch import Tensor, nn

from meshwright.parallel.apply import Plan
from meshwright.parallel.grad_norm import clip_gradients, gradient_norm
from meshwright.parallel.mesh import Axis, Mesh, Sizes, single_process_mesh
from meshwright.parallel.placement import Placement, Split
from meshwright.parallel.zero.part import Part

CONFIG = engine_cases.moe_config(num_layers=1)


def gradients_of(mesh: Mesh, stage: int) -> tuple[float, float, float]:
    """Return our norm, torch's of the gathered gradients, and torch's again after clipping to 0.05."""
    run = engine_cases.start(mesh, CONFIG, Plan(stage=stage))
    parts = run.engine.parts
    engine_cases.forward_backward(run, 0, 2)
    norm = gradient_norm(parts.values())
    wholes = [engine_cases.gather(part, part.parameter.grad) for part in parts.values()]
    clip_gradients(parts.values(), norm, 0.05)
    clipped = [engine_cases.gather(part, part.parameter.grad) for part in parts.values()]
    return norm, torch.nn.utils.get_total_norm(wholes).item(), torch.nn.utils.get_total_norm(clipped).item()


@pytest.mark.parametrize(
    ("sizes", "stage"),
    [
        (Sizes(dp_shard=2), 1),
        (Sizes(dp_shard=2, ep=2), 0),
        (Sizes(dp_shard=4, ep=2), 0),
        (Sizes(dp_shard=4, ep=2), 1),
        (Sizes(dp_shard=4, ep=2), 3),
    ],
)
def test_the_norm_is_that_of_the_whole_model(sizes: Sizes, stage: int) -> None:
    alone, whole_alone, _ = gradients_of(single_process_mesh(), 0)
    assert alone == pytest.approx(whole_alone, rel=1e-12)
    assert alone > 0.05
    found = run_mesh(sizes, gradients_of, stage)
    for norm, whole, clipped in found:
        assert norm == pytest.approx(whole, rel=1e-12)
        assert norm == pytest.approx(alone, rel=1e-9)
        assert clipped == pytest.approx(0.05, rel=1e-12)
    assert len({norm for norm, _, _ in found}) == 1  # bitwise, or ranks would clip differently


def part(gradient: Tensor, *splits: Split) -> Part:
    parameter = nn.Parameter(torch.zeros_like(gradient), requires_grad=False)
    parameter.grad = gradient
    axes = tuple(split.axis for split in splits if split.axis.is_split)
    return Part(parameter, Placement(splits), tuple(gradient.shape), (0,), False, axes)


def norm_with_copies(mesh: Mesh) -> float:
    # A vector of 2 in two parts, each held by two neighbouring ranks, and one element that every rank holds.
    split = Split(0, mesh.dp_shard, copies=2)
    return gradient_norm([part(torch.tensor([3.0 + split.index]), split), part(torch.tensor([12.0]))])


def test_elements_that_neighbours_hold_in_copy_count_once() -> None:
    assert run_mesh(Sizes(dp_shard=4), norm_with_copies) == [13.0] * 4  # 3, 4 and 12


def norm_with_an_empty_part(mesh: Mesh) -> float:
    own = torch.tensor([5.0]) if mesh.rank == 0 else torch.empty(0)
    return gradient_norm([part(own, Split(0, mesh.dp_shard))])


def test_a_rank_without_elements_takes_part_in_the_sum() -> None:
    assert run_mesh(Sizes(dp_shard=2), norm_with_an_empty_part) == [5.0, 5.0]


def test_large_gradients_do_not_overflow_their_square() -> None:
    assert gradient_norm([part(torch.tensor([3e25])), part(torch.tensor([4e25]))]) == pytest.approx(5e25)


def test_clipping_scales_all_gradients_and_only_when_needed() -> None:
    parts = [part(torch.tensor([3.0])), part(torch.tensor([4.0]))]
    for limit, expected in ((6.0, 3.0), (5.0, 3.0), (0.0, 3.0), (2.5, 1.5)):
        clip_gradients(parts, gradient_norm(parts), limit)
        assert parts[0].parameter.grad.item() == pytest.approx(expected)
    assert gradient_norm(parts) == pytest.approx(2.5)


@pytest.mark.parametrize("bad", [nan, inf])
def test_a_gradient_that_is_no_number_is_a_norm_that_is_none(bad: float) -> None:
    norm = gradient_norm([part(torch.tensor([1.0])), part(torch.tensor([bad]), Split(0, Axis("ep")))])
    assert not norm < inf


def test_the_norm_of_many_types_is_taken_in_fp64() -> None:
    wide = gradient_norm([part(torch.full((4,), 0.1, dtype=torch.float64))])
    assert wide == pytest.approx(sqrt(0.04), rel=1e-15)


@pytest.mark.parametrize("cut", [1, 3])
def test_the_norm_of_large_fp32_gradients_is_right_however_they_are_cut(cut: int) -> None:
    """Eight million squares added up in fp32, one after the other, are 2.5e-4 off, and parts of them by less."""
    whole = torch.randn(1 << 23, generator=torch.Generator().manual_seed(0))
    found = gradient_norm([part(piece) for piece in whole.chunk(cut)])
    # Promise 2 has 1e-5; the sums of 16,384 squares in fp32 stay within 1e-6.
    assert found == pytest.approx(whole.double().norm().item(), rel=1e-6)


def norm_of_stages(mesh: Mesh) -> float:
    # Both ends hold the tied element of 3; each stage has one of its own, 4 and 12.
    tied = part(torch.tensor([3.0]))
    tied = replace(tied, placement=Placement(grad_sum=(mesh.ends,)))
    own = part(torch.tensor([4.0 if mesh.pp.rank == 0 else 12.0]))
    return gradient_norm([tied, own], mesh.pp)


def test_stages_add_up_and_a_tied_matrix_counts_once() -> None:
    assert run_mesh(Sizes(pp=2), norm_of_stages) == [13.0] * 2
