"""A described part says where a rank's tensor lies in the global one; torch's own cuts are the judge."""

import pytest
import torch
from checkpoint_cases import cut
from rank_pool import run_mesh
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from meshwright.parallel.checkpoint.describe import describe
from meshwright.parallel.mesh import Axis, Mesh, Sizes, single_process_mesh
from meshwright.parallel.placement import WHOLE, Placement, Split


def test_one_process_holds_everything() -> None:
    tensor = torch.arange(6).view(2, 3)
    part = describe(tensor, (2, 3), WHOLE, single_process_mesh(), zero_part=True)
    assert torch.equal(part.tensor, tensor)
    assert part.offset == (0, 0)


def nested_cuts_are_those_of_dtensor(mesh: Mesh) -> None:
    ranks = torch.tensor([[0, 2], [1, 3]])  # (ep, edp)
    device_mesh = DeviceMesh("cpu", ranks)
    for rows in (2, 4, 6, 10, 14):
        placement = Placement(splits=(Split(0, mesh.ep),), factorisation="expert")
        local = cut(torch.zeros(rows, 3), placement, mesh, zero_part=True)
        part = describe(local, (rows, 3), placement, mesh, zero_part=True)
        shape, offset = compute_local_shape_and_global_offset((rows, 3), device_mesh, [Shard(0), Shard(0)])
        assert tuple(part.tensor.shape) == tuple(shape)
        if part.tensor.numel():
            assert part.offset == tuple(offset)


def test_nested_cuts_are_those_of_nested_shards() -> None:
    run_mesh(Sizes(dp_shard=4, ep=2), nested_cuts_are_those_of_dtensor)


def fsdp_shards_are_described(mesh: Mesh) -> dict[int, tuple[tuple[int, ...], tuple[int, ...]]]:
    module = nn.ParameterDict({str(n): nn.Parameter(torch.arange(n * 2.0).view(n, 2)) for n in (5, 7, 3, 8)})
    fully_shard(module, mesh=DeviceMesh.from_group(mesh.zero.group, "cpu"))
    found = {}
    for name, parameter in module.items():
        rows = int(name)
        part = describe(parameter.to_local(), (rows, 2), WHOLE, mesh, zero_part=True)
        whole = torch.arange(rows * 2.0).view(rows, 2)
        first = part.offset[0]
        assert torch.equal(part.tensor.detach(), whole[first : first + len(part.tensor)])
        found[rows] = (part.offset, tuple(part.tensor.shape))
    return found


def test_fsdp2_cuts_like_zero_also_where_ranks_stay_empty() -> None:
    by_rank = run_mesh(Sizes(dp_shard=4), fsdp_shards_are_described)
    for rows in (5, 7, 3, 8):
        assert sum(found[rows][1][0] for found in by_rank) == rows
    assert by_rank[3][5] == ((5, 0), (0, 2))


def a_dtensor_is_refused(mesh: Mesh) -> str:
    module = nn.ParameterDict({"a": nn.Parameter(torch.zeros(4, 2))})
    fully_shard(module, mesh=DeviceMesh.from_group(mesh.zero.group, "cpu"))
    try:
        describe(module["a"], (4, 2), WHOLE, mesh, zero_part=True)
    except ValueError as error:
        return str(error)
    return ""


def test_a_dtensor_is_refused_because_its_shape_may_be_local() -> None:
    assert all("to_local()" in text for text in run_mesh(Sizes(dp_shard=2), a_dtensor_is_refused))


def mesh_of(zero_rank: int, zero_size: int) -> Mesh:
    mesh = single_process_mesh()
    return Mesh(mesh.sizes, mesh.axes | {"zero": Axis("zero", zero_size, zero_rank)}, 0)


def test_padding_of_a_split_is_cut_off_after_zero_has_cut_the_padded_tensor() -> None:
    tp = Axis("tp", 2, 1)
    placement = Placement(splits=(Split(0, tp),))  # 5 rows over 2: rank 1 holds rows 3, 4 and one of padding
    padded = torch.tensor([3.0, 4.0, float("nan")])
    first = describe(padded[:2], (5,), placement, mesh_of(0, 2), zero_part=True)
    second = describe(padded[2:], (5,), placement, mesh_of(1, 2), zero_part=True)
    assert first.offset == (3,)
    assert first.tensor.tolist() == [3.0, 4.0]
    assert second.tensor.numel() == 0


def test_a_padded_zero_chunk_is_cut_to_its_real_rows() -> None:
    part = describe(torch.tensor([6.0, 0.0]), (7,), WHOLE, mesh_of(3, 4), zero_part=True)
    assert part.offset == (6,)
    assert part.tensor.tolist() == [6.0]


def test_copies_of_a_part_stand_at_the_same_place() -> None:
    offsets = [
        describe(
            torch.zeros(2, 3),
            (4, 3),
            Placement(splits=(Split(0, Axis("tp", 4, rank), copies=2),)),
            single_process_mesh(),
            zero_part=False,
        ).offset
        for rank in range(4)
    ]
    assert offsets == [(0, 0), (0, 0), (2, 0), (2, 0)]


def test_a_tensor_of_another_shape_is_refused_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"part of \[7\] is \[1\] at \[6\], but the tensor is \[4\]"):
        describe(torch.zeros(4), (7,), WHOLE, mesh_of(3, 4), zero_part=True)


def test_a_scalar_has_no_zero_part() -> None:
    with pytest.raises(ValueError, match="zero_part must be False"):
        describe(torch.tensor(1), (), WHOLE, single_process_mesh(), zero_part=True)
