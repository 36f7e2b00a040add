"""The axes of a mesh: both factorisations against groups written by hand, and the groups that really exist."""

import pytest
import torch
from rank_pool import run_mesh, run_ranks

from meshwright.parallel.collectives import all_reduce
from meshwright.parallel.config import DENSE_DIMS
from meshwright.parallel.mesh import (
    EXPERT_DIMS,
    PRODUCT_AXES,
    Axis,
    Mesh,
    Sizes,
    build_mesh,
    rank_groups,
    single_process_mesh,
)

EIGHT = Sizes(dp_replicate=1, dp_shard=2, cp=2, tp=2, ep=2, etp=2)
DENSE = {name: getattr(EIGHT, name) for name in DENSE_DIMS}
EXPERT = {name: getattr(EIGHT, name) for name in EXPERT_DIMS}


@pytest.mark.parametrize(
    ("factors", "dims", "groups"),
    [
        (DENSE, ("tp",), [(0, 1), (2, 3), (4, 5), (6, 7)]),
        (DENSE, ("cp",), [(0, 2), (1, 3), (4, 6), (5, 7)]),
        (DENSE, ("dp_shard",), [(0, 4), (1, 5), (2, 6), (3, 7)]),
        (DENSE, PRODUCT_AXES["zero"], [(0, 2, 4, 6), (1, 3, 5, 7)]),
        (DENSE, ("pp",), [(rank,) for rank in range(8)]),
        (DENSE, DENSE_DIMS, [tuple(range(8))]),
        (EXPERT, ("etp",), [(0, 1), (2, 3), (4, 5), (6, 7)]),
        (EXPERT, ("ep",), [(0, 2), (1, 3), (4, 6), (5, 7)]),
        (EXPERT, ("edp",), [(0, 4), (1, 5), (2, 6), (3, 7)]),
    ],
)
def test_groups_of_eight_ranks_are_those_written_by_hand(
    factors: dict[str, int], dims: tuple[str, ...], groups: list[tuple[int, ...]]
) -> None:
    assert list(rank_groups(factors, dims)) == groups


def test_the_two_factorisations_of_the_module_docstring_are_right() -> None:
    dense = {"pp": 1, "dp_replicate": 1, "dp_shard": 4, "cp": 1, "tp": 2}
    expert = {"pp": 1, "edp": 2, "ep": 4, "etp": 1}
    assert list(rank_groups(dense, ("dp_shard",))) == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert list(rank_groups(expert, ("ep",))) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert list(rank_groups(expert, ("edp",))) == [(0, 4), (1, 5), (2, 6), (3, 7)]


def test_a_product_axis_counts_its_first_dim_slowest() -> None:
    factors = {"pp": 2, "dp_replicate": 2, "dp_shard": 2, "cp": 1, "tp": 1}
    assert list(rank_groups(factors, PRODUCT_AXES["dp"])) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert list(rank_groups(factors, ("dp_replicate",))) == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert list(rank_groups(factors, ("pp",))) == [(0, 4), (1, 5), (2, 6), (3, 7)]


def test_every_rank_is_in_one_group_of_each_kind() -> None:
    for factors, names in ((DENSE, DENSE_DIMS), (EXPERT, EXPERT_DIMS)):
        for name in names:
            members = [rank for group in rank_groups(factors, (name,)) for rank in group]
            assert sorted(members) == list(range(8))


def axes_of(mesh: Mesh) -> dict[str, tuple[tuple[int, ...], int]]:
    sums = {}
    for name, axis in mesh.axes.items():
        total = torch.tensor(float(2**mesh.rank), dtype=torch.float64)
        all_reduce(total, axis)
        assert total.item() == sum(2**rank for rank in axis.ranks), f"{name} sums over other ranks than it says"
        assert axis.ranks[axis.rank] == mesh.rank
        assert (axis.group is None) == (axis.size == 1)
        sums[name] = (axis.ranks, axis.rank)
    return sums


def test_a_built_mesh_has_the_axes_of_both_factorisations() -> None:
    # Four ranks: dp_replicate 2 x dp_shard 2 for the dense part, edp 2 x ep 2 for the experts.
    by_rank = run_mesh(Sizes(dp_replicate=2, dp_shard=2, ep=2), axes_of)
    assert by_rank[3]["dp_shard"] == ((2, 3), 1)
    assert by_rank[3]["dp_replicate"] == ((1, 3), 1)
    assert by_rank[3]["zero"] == ((2, 3), 1)
    assert by_rank[2]["data"] == by_rank[2]["dp"] == by_rank[2]["world"] == ((0, 1, 2, 3), 2)
    assert by_rank[1]["ep"] == ((0, 1), 1)
    assert by_rank[1]["edp"] == ((1, 3), 0)
    assert by_rank[1]["tp"] == by_rank[1]["pp"] == by_rank[1]["cp"] == ((1,), 0)


def test_axes_over_the_same_ranks_share_one_group() -> None:
    assert run_mesh(Sizes(dp_shard=2, ep=2), same_groups) == [True, True]


def same_groups(mesh: Mesh) -> bool:
    return mesh.ep.group is mesh.dp_shard.group is mesh.zero.group is mesh.world.group


def test_one_process_has_every_axis_and_no_group() -> None:
    mesh = single_process_mesh()
    assert set(mesh.axes) == {*DENSE_DIMS, *EXPERT_DIMS, *PRODUCT_AXES, "ends", "world"}
    assert all(axis.size == 1 and axis.rank == 0 and axis.group is None for axis in mesh.axes.values())
    assert build_mesh(Sizes()).axes == mesh.axes
    assert not Axis("ep").is_split
    assert Axis("ep", size=2).is_split


def test_edp_is_what_the_experts_leave_of_a_stage() -> None:
    assert EIGHT.world == 8
    assert EIGHT.edp == 2
    assert Sizes(pp=2, dp_shard=4, ep=4).edp == 1
    with pytest.raises(ValueError, match=r"ep \* etp = 3 must divide dp \* cp \* tp = 4"):
        _ = Sizes(pp=2, dp_shard=4, ep=3).edp


def wrong_world(axis: Axis) -> str:
    with pytest.raises(ValueError) as error:
        build_mesh(Sizes(dp_shard=3))
    return str(error.value)


def test_sizes_that_do_not_make_the_world_are_refused() -> None:
    assert run_ranks(2, wrong_world) == ["the axes multiply to 3 ranks, the world has 2"] * 2


def ends_of(mesh: Mesh) -> tuple[int, ...]:
    assert mesh.ends.ranks[mesh.ends.rank] == mesh.rank
    return mesh.ends.ranks


def test_the_ends_of_a_pipeline_are_its_first_and_last_rank() -> None:
    assert run_mesh(Sizes(pp=2, dp_shard=2), ends_of) == [(0, 2), (1, 3), (0, 2), (1, 3)]
    assert run_mesh(Sizes(pp=4), ends_of) == [(0, 3), (1,), (2,), (0, 3)]
