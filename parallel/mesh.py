"""The axes along which the ranks of a run share the work, in two factorisations of the same world.

    dense    pp x dp_replicate x dp_shard x cp x tp      tp varies fastest
    expert   pp x edp x ep x etp                         etp varies fastest

Both cut the ranks of a stage (dp_replicate * dp_shard * cp * tp of them), the first for attention,
norms and embeddings, the second for experts. With dp_shard = 4, tp = 2, ep = 4, the eight ranks are

    dense    (dp_shard, tp)    0:(0,0) 1:(0,1) 2:(1,0) 3:(1,1) 4:(2,0) 5:(2,1) 6:(3,0) 7:(3,1)
    expert   (edp, ep)         0:(0,0) 1:(0,1) 2:(0,2) 3:(0,3) 4:(1,0) 5:(1,1) 6:(1,2) 7:(1,3)

Some axes are products of others: `dp` (who gets which samples), `data` (over what a dense gradient is
summed), `zero` (over what dense state is sharded), `token` (who holds pieces of one sequence), `world`. Others
are pieces of tp: where tp exceeds the key and value heads, `copies` neighbouring ranks hold the same head and are
an axis of their own (`neighbours`). `ends` joins the first and the last rank of pp, which both hold a tied embedding;
for the ranks between them it has size 1. A layer takes an `Axis`, never a mesh.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from math import prod

import torch.distributed as dist

from meshwright.parallel.config import DENSE_DIMS

EXPERT_DIMS = ("pp", "edp", "ep", "etp")

# A product axis, by the dims that it runs over; the first named varies slowest.
PRODUCT_AXES: dict[str, tuple[str, ...]] = {
    "dp": ("dp_replicate", "dp_shard"),
    "data": ("dp_replicate", "dp_shard", "cp"),
    "zero": ("dp_shard", "cp"),
    "token": ("cp", "tp"),
}


@dataclass(frozen=True)
class Axis:
    """One axis as seen by one rank. Of size 1 it is no axis: nothing is communicated and `group` is None."""

    name: str
    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    ranks: tuple[int, ...] = (0,)
    """The global ranks along this axis, in its order."""

    @property
    def is_split(self) -> bool:
        """Say whether there is more than one rank along this axis."""
        return self.size > 1


# What a layer takes that is built without a mesh.
NO_TP, NO_CP, NO_EP, NO_ETP = (Axis(name) for name in ("tp", "cp", "ep", "etp"))


@dataclass(frozen=True)
class Sizes:
    """How many ranks each axis has. `edp` is what remains of a stage for the experts."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def world(self) -> int:
        """Return the number of ranks."""
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def edp(self) -> int:
        """Return how many ranks hold the same experts.

        Raises:
            ValueError: if ep * etp does not divide the ranks of a stage.
        """
        stage = self.world // self.pp
        if stage % (self.ep * self.etp) != 0:
            raise ValueError(f"ep * etp = {self.ep * self.etp} must divide dp * cp * tp = {stage}")
        return stage // (self.ep * self.etp)


class Mesh:
    """Every axis of this rank, by name: `mesh.ep.size`, `mesh.data.group`."""

    def __init__(self, sizes: Sizes, axes: dict[str, Axis], rank: int) -> None:
        """Hold the axes; `build_mesh` and `single_process_mesh` make them."""
        self.sizes = sizes
        self.rank = rank
        self.axes = axes
        self.pp, self.cp, self.tp = axes["pp"], axes["cp"], axes["tp"]
        self.dp_replicate, self.dp_shard = axes["dp_replicate"], axes["dp_shard"]
        self.edp, self.ep, self.etp = axes["edp"], axes["ep"], axes["etp"]
        self.dp, self.data, self.zero, self.world = axes["dp"], axes["data"], axes["zero"], axes["world"]
        self.token, self.ends = axes["token"], axes["ends"]

    def neighbours(self, copies: int) -> Axis:
        """Return the axis over the `copies` neighbouring ranks of tp that hold the same part.

        Raises:
            ValueError: if `copies` does not divide tp.
        """
        if copies == 1:
            return Axis(_neighbours_name(1))
        if self.tp.size % copies != 0:
            raise ValueError(f"copies = {copies} does not divide tp = {self.tp.size}")
        return self.axes[_neighbours_name(copies)]


def single_process_mesh() -> Mesh:
    """Return the mesh of one process: every axis has size 1 and no process group is needed."""
    names = {*DENSE_DIMS, *EXPERT_DIMS, *PRODUCT_AXES, "ends", "world"}
    return Mesh(Sizes(), {name: Axis(name) for name in names}, rank=0)


def build_mesh(sizes: Sizes, timeout: timedelta | None = None) -> Mesh:
    """Make a process group for each axis that has more than one rank; every rank must call this.

    Groups with the same ranks are made once. `torch.distributed` must be initialised with
    `sizes.world` ranks, or not at all when that is 1.

    Raises:
        ValueError: if the sizes do not multiply to the world size.
    """
    if sizes.world == 1 and not dist.is_initialized():
        return single_process_mesh()
    if sizes.world != dist.get_world_size():
        raise ValueError(f"the axes multiply to {sizes.world} ranks, the world has {dist.get_world_size()}")
    rank = dist.get_rank()
    dense = {name: getattr(sizes, name) for name in DENSE_DIMS}
    expert = {name: getattr(sizes, name) for name in EXPERT_DIMS}
    wanted: list[tuple[str, Iterable[tuple[int, ...]]]] = []
    wanted += [(name, rank_groups(dense, (name,))) for name in DENSE_DIMS]
    wanted += [(name, rank_groups(expert, (name,))) for name in EXPERT_DIMS if name != "pp"]
    wanted += [(name, rank_groups(dense, dims)) for name, dims in PRODUCT_AXES.items()]
    wanted += [("ends", [(line[0], line[-1]) for line in rank_groups(dense, ("pp",)) if len(line) > 1])]
    wanted += [("world", rank_groups(dense, DENSE_DIMS))]
    for copies in range(2, sizes.tp + 1):
        if sizes.tp % copies == 0:
            split_tp = {**dense, "tp": sizes.tp // copies, "copies": copies}
            wanted += [(_neighbours_name(copies), rank_groups(split_tp, ("copies",)))]

    groups: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
    axes: dict[str, Axis] = {"ends": Axis("ends", ranks=(rank,))}
    for name, all_ranks in wanted:
        for ranks in all_ranks:
            # Every rank must make every group, in the same order, also those that it is not in.
            if len(ranks) > 1 and ranks not in groups:
                groups[ranks] = dist.new_group(list(ranks), timeout=timeout)
            if rank in ranks:
                axes[name] = Axis(name, len(ranks), ranks.index(rank), groups.get(ranks), ranks)
    return Mesh(sizes, axes, rank)


def _neighbours_name(copies: int) -> str:
    return f"tp/{copies}"


def rank_groups(factors: dict[str, int], dims: tuple[str, ...]) -> Iterator[tuple[int, ...]]:
    """Yield the groups of global ranks that differ only along `dims`, the last dim of `factors` varying fastest.

    Example: factors {"dp": 2, "tp": 2} give ("tp",): (0, 1), (2, 3), and ("dp",): (0, 2), (1, 3).
    """
    names = list(factors)
    stride = {name: prod(factors[later] for later in names[i + 1 :]) for i, name in enumerate(names)}
    outer = [name for name in names if name not in dims]
    for fixed in product(*(range(factors[name]) for name in outer)):
        start = sum(at * stride[name] for at, name in zip(fixed, outer, strict=True))
        yield tuple(
            start + sum(at * stride[name] for at, name in zip(moving, dims, strict=True))
            for moving in product(*(range(factors[name]) for name in dims))
        )
