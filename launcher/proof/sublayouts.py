"""Which small layouts stand for a large one: on at most 8 ranks, with every three of its axes above 1 together.

    target  tp 8, pp 4, dp_shard 64 (2048 ranks)      active axes   tp, pp, dp_shard
    one sub-layout                                    tp 2, pp 2, dp_shard 2 (8 ranks)

A fault of one axis shows at size 2, a fault of their composition where two or three of them are above 1. A layout
that fits in 8 ranks stands for itself. Otherwise the fewest sub-layouts are looked for in which every set of three
active axes (or the largest set that fits) is above 1 together at least once; ranks that are left over make an axis
4 long, because a ring of two cannot tell left from right. `edp`, the copies of the experts, counts as an axis.

This file is arithmetic on sizes. Equal arguments give equal answers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, product

from meshwright.parallel.config import AXES
from meshwright.parallel.mesh import Sizes

MOST_RANKS = 8
# An axis of 4 first where order within the axis matters most.
_TO_GROW = ("cp", "tp", "pp", "ep", "dp_shard", "etp", "dp_replicate")
_TOGETHER = 3
_MOST_SEARCHED = 20_000


@dataclass(frozen=True)
class Cover:
    """Sub-layouts, and the sets of active axes that were never above 1 together in any of them."""

    layouts: tuple[Sizes, ...]
    active: tuple[str, ...]
    never_together: tuple[frozenset[str], ...]
    """Only the smallest such sets, single axes too: what contains one of them was never together either."""


def active_axes(sizes: Sizes, *, has_experts: bool) -> tuple[str, ...]:
    """Return the axes that are above 1, the copies of the experts (`edp`) among them where there are experts."""
    found = [axis for axis in AXES if getattr(sizes, axis) > 1]
    return (*found, "edp") if has_experts and sizes.edp > 1 else tuple(found)


def cover(
    target: Sizes, *, has_experts: bool, accepts: Callable[[Sizes], bool] = lambda _: True, most_ranks: int = MOST_RANKS
) -> Cover:
    """Return the fewest sub-layouts that have every three active axes of `target` above 1 together.

    `accepts` says which of them the run file's checks let pass.
    """
    active = active_axes(target, has_experts=has_experts)
    if not active:
        return Cover((), (), ())
    held = {sizes: frozenset(active_axes(sizes, has_experts=has_experts)) for sizes in candidates(target, most_ranks)}
    held = {sizes: axes for sizes, axes in held.items() if axes <= frozenset(active) and accepts(sizes)}
    wanted = _wanted(active, held.values())
    chosen = _fewest({sizes: _mask(axes, wanted) for sizes, axes in held.items()}, len(wanted))
    grown = _grown(chosen, held)
    return Cover(tuple(grown), active, tuple(_never_together(active, [held[sizes] for sizes in grown])))


def candidates(target: Sizes, most_ranks: int = MOST_RANKS) -> list[Sizes]:
    """Return every sub-layout of at most so many ranks, those of the fewest ranks first; the target alone if it fits.

    An axis of the target may be 1, 2 or 4 long, an axis that it has not stays 1.
    """
    if target.world <= most_ranks:
        return [target]
    options = [[size for size in (1, 2, 4) if size <= getattr(target, axis)] for axis in AXES]
    found = []
    for picked in product(*options):
        sizes = Sizes(**dict(zip(AXES, picked, strict=True)))
        if 1 < sizes.world <= most_ranks and _has_room_for_experts(sizes):
            found.append(sizes)
    return sorted(found, key=_order)


def without(sizes: Sizes, axis: str) -> Sizes | None:
    """Return the layout with one axis off; None if the experts that are left have no ranks to lie on."""
    smaller = replace(sizes, **{axis: 1})
    return smaller if _has_room_for_experts(smaller) else None


def said(sizes: Sizes) -> str:
    """Return a layout as a person writes it: `tp=2, ep=2`; one process is `one process`."""
    text = ", ".join(f"{axis}={size}" for axis, size in asdict(sizes).items() if size > 1)
    return text or "one process"


def _order(sizes: Sizes) -> tuple[int, ...]:
    return (sizes.world, *(getattr(sizes, axis) for axis in AXES))


def _has_room_for_experts(sizes: Sizes) -> bool:
    return (sizes.world // sizes.pp) % (sizes.ep * sizes.etp) == 0


def _wanted(active: Sequence[str], held: Iterable[frozenset[str]]) -> list[frozenset[str]]:
    """Return the sets of at most three axes that some candidate has together, without those within another one."""
    possible = set(held)
    sets = [
        wanted
        for count in range(min(_TOGETHER, len(active)), 0, -1)
        for wanted in map(frozenset, combinations(active, count))
        if any(wanted <= axes for axes in possible)
    ]
    return [wanted for wanted in sets if not any(wanted < other for other in sets)]


def _mask(axes: frozenset[str], wanted: Sequence[frozenset[str]]) -> int:
    """Return which of the wanted sets a candidate has together, as bits."""
    return sum(1 << at for at, one in enumerate(wanted) if one <= axes)


def _fewest(masks: dict[Sizes, int], num_wanted: int) -> list[Sizes]:
    """Return the fewest candidates whose bits together are all `num_wanted` ones."""
    first_of: dict[int, Sizes] = {}
    for sizes, mask in masks.items():  # of equals the one with the fewest ranks, which comes first
        first_of.setdefault(mask, sizes)
    useful = {mask: s for mask, s in first_of.items() if not any(mask | other == other != mask for other in first_of)}
    everything = (1 << num_wanted) - 1
    greedy = _greedily(list(useful), everything)
    for count in range(_at_least(list(useful), num_wanted), len(greedy)):
        if found := _Search(list(useful), num_wanted).within(count):
            return [useful[mask] for mask in found]
    return [useful[mask] for mask in greedy]


def _greedily(masks: list[int], everything: int) -> list[int]:
    picked, covered = [], 0
    while covered != everything:
        best = max(masks, key=lambda mask: (mask & ~covered).bit_count())
        picked.append(best)
        covered |= best
    return picked


def _at_least(masks: list[int], num_wanted: int) -> int:
    """Return how many are needed at least: wanted sets of which no candidate has two."""
    apart: list[int] = []
    for at in range(num_wanted):
        if not any(mask >> at & 1 and any(mask >> other & 1 for other in apart) for mask in masks):
            apart.append(at)
    return len(apart)


class _Search:
    """Look for a cover of a given count; give up after a bounded number of tries."""

    def __init__(self, masks: list[int], num_wanted: int) -> None:
        self.everything = (1 << num_wanted) - 1
        self.having = [[mask for mask in masks if mask >> at & 1] for at in range(num_wanted)]
        self.widest = max((mask.bit_count() for mask in masks), default=1)
        self.tries = 0

    def within(self, count: int, covered: int = 0) -> list[int] | None:
        left = self.everything & ~covered
        if not left:
            return []
        self.tries += 1
        if count * self.widest < left.bit_count() or self.tries > _MOST_SEARCHED:
            return None
        hardest = min((at for at in range(len(self.having)) if left >> at & 1), key=lambda at: len(self.having[at]))
        for mask in sorted(self.having[hardest], key=lambda mask: -(mask & left).bit_count()):
            rest = self.within(count - 1, covered | mask)
            if rest is not None:
                return [mask, *rest]
        return None


def _grown(chosen: list[Sizes], held: dict[Sizes, frozenset[str]]) -> list[Sizes]:
    """Return the chosen ones with an axis 4 long, wherever the ranks allow and no other has it 4 long."""
    grown = sorted(chosen, key=_order)
    for axis in _TO_GROW:
        if any(getattr(sizes, axis) >= 4 for sizes in grown):
            continue
        for at, sizes in enumerate(grown):
            larger = [
                one
                for one, axes in held.items()
                if getattr(one, axis) == 4
                and axes >= held[sizes]
                and all(getattr(one, each) >= getattr(sizes, each) for each in AXES)
            ]
            if larger:
                grown[at] = larger[0]
                break
    return grown


def _never_together(active: Sequence[str], together: Sequence[frozenset[str]]) -> Iterator[frozenset[str]]:
    found: list[frozenset[str]] = []
    for count in range(1, len(active) + 1):
        for axes in map(frozenset, combinations(active, count)):
            if not any(axes <= held for held in together) and not any(smaller <= axes for smaller in found):
                found.append(axes)
    yield from found
