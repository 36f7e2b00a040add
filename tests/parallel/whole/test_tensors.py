"""What parts hold of whole tensors, over every kind of cut: uneven, nested, copied, padded; shared work on wholes."""

from dataclasses import replace

import pytest
import torch
from rank_pool import run_mesh
from torch import Tensor, nn

from meshwright.parallel.mesh import Axis, Mesh, Sizes, single_process_mesh
from meshwright.parallel.placement import Placement, Split, chunk_bounds
from meshwright.parallel.whole.shared_work import Matrix, SharedWork, way_of_cutting
from meshwright.parallel.whole.tensors import Box, box_of, cuts_of, held_box
from meshwright.parallel.zero.part import Part

FOUR = Sizes(dp_shard=2, tp=2)
# name -> global shape, splits as (dim, axis, copies), whether ZeRO cuts dim 0; no size divides by two
CUT = {
    "plain": ((7, 5), (), False),
    "zero": ((7, 5), (), True),
    "column": ((6, 5), ((0, "tp", 1),), True),
    "row": ((7, 6), ((1, "tp", 1),), True),
    "row alone": ((7, 6), ((1, "tp", 1),), False),
    "padded": ((5, 7), ((0, "tp", 1),), True),
    "copied": ((5, 3), ((0, "tp", 2),), True),
    "stack": ((3, 4, 6), ((2, "tp", 1),), True),
    "few rows": ((1, 3), (), True),
}


def local_part(mesh: Mesh, name: str) -> tuple[Part, Tensor]:
    """Cut a whole by hand, with torch's own chunk where there is no padding."""
    shape, splits, is_zero_part = CUT[name]
    whole = torch.arange(float(torch.Size(shape).numel())).view(shape) + 100 * list(CUT).index(name)
    placement = Placement(tuple(Split(dim, mesh.axes[axis], copies) for dim, axis, copies in splits))
    held, offset = whole, [0] * len(shape)
    for split in placement.splits:
        length = -(-held.shape[split.dim] // split.parts)
        padded = torch.full_like(held, -1.0).repeat_interleave(2, split.dim)
        padded.narrow(split.dim, 0, held.shape[split.dim]).copy_(held)
        held = padded.narrow(split.dim, split.index * length, length)
        offset[split.dim] += split.index * length
    if is_zero_part:
        first, last = chunk_bounds(held.shape[0], mesh.zero.size, mesh.zero.rank)
        held, offset[0] = held[first:last], offset[0] + first
    parameter = nn.Parameter(held.clone(), requires_grad=False)
    return Part(parameter, placement, shape, tuple(offset), is_zero_part=is_zero_part, split_axes=()), whole


def hold_their_boxes(mesh: Mesh) -> None:
    for name in CUT:
        part, whole = local_part(mesh, name)
        box = held_box(part, mesh)
        held = part.parameter[tuple(slice(0, size) for size in box.size)]
        assert torch.equal(whole[box.within(Box((0,) * whole.dim(), tuple(whole.shape)))], held), name
        assert -1.0 not in held
        assert int((part.parameter != -1.0).sum()) == box.numel, name  # what is left out is padding


def test_a_box_says_what_a_part_holds_of_its_whole() -> None:
    run_mesh(FOUR, hold_their_boxes)
    run_mesh(Sizes(tp=2), hold_their_boxes)


def doubled(mesh: Mesh) -> list[list[tuple[str, int]]]:
    """Work on wholes: what comes back is this rank's piece of the doubled whole."""
    made = {name: local_part(mesh, name) for name in CUT}
    parts = {name: part for name, (part, _) in made.items()}
    alike: dict[object, list[Matrix]] = {}
    for name, part in parts.items():
        lead = held_box(part, mesh).size[:-2]
        alike.setdefault(way_of_cutting(part, mesh), []).extend(Matrix(name, n) for n in range(*(lead or (1,))))
    mine = []
    for matrices in alike.values():
        if not matrices:
            continue
        shared = SharedWork(parts, matrices, mesh, lambda rows, cols: float(rows * cols))
        mine += [tuple(one) for one in shared.mine]
        pieces = []
        for name, number in matrices:
            held = parts[name].parameter[tuple(slice(0, size) for size in held_box(parts[name], mesh).size)]
            pieces.append(held[number] if held.dim() == 3 else held)

        def work(wholes: list[Tensor], expected: list[Matrix] = shared.mine) -> list[Tensor]:
            assert [tuple(one.shape) for one in wholes] == [CUT[name][0][-2:] for name, _ in expected]
            assert not any((one == -1.0).any() for one in wholes)
            return [2.0 * one for one in wholes]

        for piece, result in zip(pieces, shared.on_wholes(pieces, work), strict=True):
            assert torch.equal(result, 2.0 * piece)
    return mine


def test_work_is_done_once_on_each_whole_and_comes_back_to_all() -> None:
    found = run_mesh(FOUR, doubled)
    everyone = [one for mine in found for one in mine]
    # On four ranks: cut or repeated over both axes, a matrix is worked on once; what tp only repeats, on both of tp.
    for name in ("column", "row", "row alone", "padded", "copied"):
        assert everyone.count((name, 0)) == 1, name
    for name in ("plain", "zero", "few rows"):
        assert everyone.count((name, 0)) == 2, name
    # The stack of three: ZeRO gave two whole (but for tp) to one rank, one to the other.
    assert sorted(one for one in everyone if one[0] == "stack") == [("stack", 0), ("stack", 0), ("stack", 1)]


def test_a_box_is_cut_like_describe_says() -> None:
    """The picture of parallel/checkpoint/describe.py: 7 rows over ep = 2, then ZeRO over edp = 2."""
    rows = []
    for ep in (0, 1):
        for edp in (0, 1):
            part = Part(
                nn.Parameter(torch.zeros(2, 3)),
                Placement((Split(0, Axis("ep", 2, ep)),), factorisation="expert"),
                (7, 3),
                (4 * ep + 2 * edp, 0),
                is_zero_part=True,
                split_axes=(),
            )
            mesh = Mesh(Sizes(), single_process_mesh().axes | {"edp": Axis("edp", 2, edp)}, 0)
            box = box_of(part.global_shape, cuts_of(part, mesh))
            rows.append((box.begin[0], box.begin[0] + box.size[0]))
            with pytest.raises(AssertionError, match=r"does not begin at|is not of the size"):
                held_box(replace(part, offset=(1, 0)), mesh)
    assert rows == [(0, 2), (2, 4), (4, 6), (6, 7)]
