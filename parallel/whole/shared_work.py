"""Work on whole matrices, divided over the ranks that hold parts of them: each gets some whole, and gives back results.

A matrix is the last two dims of a parameter; what is cut there is undone innermost first (`whole.py`):

    [h, f], Split(0, tp), ZeRO over zero    zero: rows of the tp part; then tp: the matrix
    [e, f, h], Split(0, ep), ZeRO over edp  a rank holds whole matrices: nothing is exchanged
    [e, f, h], Split(1, etp)                etp alone
    [h, f], ZeRO-0 over dp                  everyone holds it all: nothing is gathered, results are given to each other

The matrices are divided over the ranks of an axis by what they cost, before anything is sent, so that each rank
gathers, and works on, its share only: every element goes to one rank and back, and never to all. Axes over which a
matrix is only repeated come first: they divide the work, and what is gathered for it. Many matrices go in one exchange.
What comes out is the same in every layout, because the work is done on wholes.

    rank 0   w[0:2]  v[0:1]        w whole  -> work -> w'        w'[0:2]  v'[0:1]
    rank 1   w[2:4]  v[1:2]        v whole  -> work -> v'        w'[2:4]  v'[1:2]

This file does not know what the work is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from meshwright.parallel.collectives import exchange_rows
from meshwright.parallel.mesh import Axis, Mesh
from meshwright.parallel.whole.tensors import Box, Cut, box_of, boxes_along, cuts_of
from meshwright.parallel.zero.part import Part


class Matrix(NamedTuple):
    """One matrix of a parameter: the only one, or one of a stack, counted in what this rank holds."""

    name: str
    number: int


class SharedWork:
    """Matrices that were cut in one way, and who works on which of them."""

    def __init__(
        self, parts: Mapping[str, Part], matrices: Sequence[Matrix], mesh: Mesh, cost: Callable[[int, int], float]
    ) -> None:
        """Divide the matrices; `cost` says what work a matrix of so many rows and columns is."""
        shapes = [parts[name].global_shape[-2:] for name, _ in matrices]
        cuts = [_cuts_within(parts[name], mesh) for name, _ in matrices]
        costs = [cost(*shape) for shape in shapes]
        self._exchanges: list[_Exchange] = []
        present = list(range(len(matrices)))
        held = [box_of(shape, of_one) for shape, of_one in zip(shapes, cuts, strict=True)]
        for axis in _repeated_over(parts[matrices[0].name], mesh):
            pieces = [[box] * axis.size for box in held]
            self._exchanges.append(_Exchange(axis, _divide(present, costs, axis), pieces, held))
            present = self._exchanges[-1].mine
        while cuts[0]:
            axis = cuts[0][-1].axis
            pieces = [boxes_along(shape, of_one) for shape, of_one in zip(shapes, cuts, strict=True)]
            cuts = [of_one[:-1] for of_one in cuts]
            held = [box_of(shape, of_one) for shape, of_one in zip(shapes, cuts, strict=True)]
            self._exchanges.append(_Exchange(axis, _divide(present, costs, axis), pieces, held))
            present = self._exchanges[-1].mine
        self.mine = [matrices[at] for at in present]

    def on_wholes(self, pieces: list[Tensor], work: Callable[[list[Tensor]], list[Tensor]]) -> list[Tensor]:
        """Hand this rank's share of whole matrices to `work`; return everyone's results, this rank's piece of each.

        Every rank of the axes must call this, with pieces of one type. `work` keeps order, shapes and type.
        """
        like = pieces[0]
        held = dict(enumerate(pieces))
        for exchange in self._exchanges:
            held = exchange.gather(held, like)
        held = dict(zip(held, work(list(held.values())), strict=True))
        for exchange in reversed(self._exchanges):
            held = exchange.give_back(held, like)
        return [held[at] for at in range(len(pieces))]


def way_of_cutting(part: Part, mesh: Mesh) -> tuple[tuple[int, ...], ...]:
    """Return what is equal for all matrices that one `SharedWork` can take."""
    repeated = [axis.ranks for axis in _repeated_over(part, mesh)]
    return (*repeated, (), *(cut.axis.ranks for cut in _cuts_within(part, mesh)))


class _Exchange:
    """One axis: who works on which matrix, and what goes from whom to whom."""

    def __init__(self, axis: Axis, worker: dict[int, int], pieces: list[list[Box]], outer: list[Box]) -> None:
        """Take who works on which matrix, what every rank of the axis holds of it, and the box that that makes."""
        self.axis, self.worker, self.pieces, self.outer = axis, worker, pieces, outer
        self.mine = [at for at, rank in worker.items() if rank == axis.rank]
        sources = {at: self._sources(at) for at in worker}
        self._to = [[at for at in worker if worker[at] == to and axis.rank in sources[at]] for to in self._ranks]
        self._from = [[at for at in self.mine if source in sources[at]] for source in self._ranks]

    @property
    def _ranks(self) -> range:
        return range(self.axis.size)

    def _sources(self, at: int) -> set[int]:
        """Return who sends pieces of a matrix: of ranks that hold the same, one, and the worker itself where it can."""
        holders: dict[Box, list[int]] = {}
        for rank, box in enumerate(self.pieces[at]):
            if box.numel:
                holders.setdefault(box, []).append(rank)
        worker = self.worker[at]
        return {worker if worker in ranks else ranks[worker % len(ranks)] for ranks in holders.values()}

    def gather(self, held: dict[int, Tensor], like: Tensor) -> dict[int, Tensor]:
        """Send pieces to those who work on them; return what this rank works on, as far as this axis had cut it."""
        sent = [[held[at] for at in matrices] for matrices in self._to]
        sizes = [[self.pieces[at][source].size for at in self._from[source]] for source in self._ranks]
        received = _exchange(sent, sizes, self.axis, like)
        wholes = {at: like.new_empty(self.outer[at].size) for at in self.mine}
        for source, tensors in enumerate(received):
            for at, tensor in zip(self._from[source], tensors, strict=True):
                wholes[at][self.pieces[at][source].within(self.outer[at])] = tensor
        return wholes

    def give_back(self, wholes: dict[int, Tensor], like: Tensor) -> dict[int, Tensor]:
        """Send everyone its piece of what was worked on here; return this rank's pieces."""
        sent = [[wholes[at][self.pieces[at][to].within(self.outer[at])] for at in self.mine] for to in self._ranks]
        by_worker = [[at for at, rank in self.worker.items() if rank == worker] for worker in self._ranks]
        sizes = [[self.pieces[at][self.axis.rank].size for at in matrices] for matrices in by_worker]
        received = _exchange(sent, sizes, self.axis, like)
        return {
            at: tensor
            for matrices, tensors in zip(by_worker, received, strict=True)
            for at, tensor in zip(matrices, tensors, strict=True)
        }


def _cuts_within(part: Part, mesh: Mesh) -> list[Cut]:
    """Return the cuts of the last two dims, with those counted as 0 and 1."""
    before = len(part.global_shape) - 2
    return [replace(cut, dim=cut.dim - before) for cut in cuts_of(part, mesh) if cut.dim >= before]


def _repeated_over(part: Part, mesh: Mesh) -> list[Axis]:
    """Return the data axes along which every rank holds the same part."""
    cut = {axis.axis.ranks for axis in cuts_of(part, mesh)}
    return [axis for axis in part.placement.data_axes(mesh) if axis.is_split and axis.ranks not in cut]


def _divide(matrices: Sequence[int], costs: Sequence[float], axis: Axis) -> dict[int, int]:
    """Give each matrix to a rank, the dearest first, each to the rank that has the least to do; in the given order."""
    load = [0.0] * axis.size
    chosen: dict[int, int] = {}
    for at in sorted(matrices, key=lambda at: (-costs[at], at)):
        rank = load.index(min(load))
        load[rank] += costs[at]
        chosen[at] = rank
    return {at: chosen[at] for at in matrices}


def _exchange(
    sent: list[list[Tensor]], sizes: list[list[tuple[int, ...]]], axis: Axis, like: Tensor
) -> list[list[Tensor]]:
    """Send to each rank a list of tensors; return each rank's list for this one, of tensors of the sizes given."""
    flat = [tensor.reshape(-1) for tensors in sent for tensor in tensors]
    buffer = torch.cat(flat) if flat else like.new_empty(0)
    counts = [sum(tensor.numel() for tensor in tensors) for tensors in sent]
    numbers = [[prod(size) for size in of_source] for of_source in sizes]
    arrived = exchange_rows(buffer[:, None], counts, [sum(of_source) for of_source in numbers], axis)[:, 0]
    stretches = iter(torch.split(arrived, [number for of_source in numbers for number in of_source]))
    return [[next(stretches).view(size) for size in of_source] for of_source in sizes]
