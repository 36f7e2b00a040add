"""Sub-layouts: few, small, and every three axes together in one of them."""

import random
from dataclasses import asdict
from itertools import combinations, product
from math import prod

import pytest

from meshwright.launcher.proof.sublayouts import AXES, active_axes, cover, said, without
from meshwright.parallel.mesh import Sizes


def random_target(seed: int) -> Sizes:
    """Return a layout of up to a few thousand ranks."""
    draw = random.Random(seed)
    dense = {axis: draw.choice([1, 1, 2, 2, 3, 4, 8]) for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp")}
    stage = dense["dp_replicate"] * dense["dp_shard"] * dense["cp"] * dense["tp"]
    ep = draw.choice([size for size in range(1, stage + 1) if stage % size == 0])
    etp = draw.choice([size for size in (1, 2, 4) if stage % (ep * size) == 0])
    return Sizes(**dense, ep=ep, etp=etp)


def above_one(pp: int, dp_replicate: int, dp_shard: int, cp: int, tp: int, ep: int, etp: int) -> set[str]:
    """Return the axes of a layout that are above 1, the copies of the experts among them."""
    sizes = {"pp": pp, "dp_replicate": dp_replicate, "dp_shard": dp_shard, "cp": cp, "tp": tp, "ep": ep, "etp": etp}
    sizes["edp"] = dp_replicate * dp_shard * cp * tp // (ep * etp)
    return {axis for axis, size in sizes.items() if size > 1}


def possible_by_hand(target: Sizes) -> list[set[str]]:
    """Return which axes can stand together at all on 8 ranks: by loops over the sizes 1, 2 and 4, and a product."""
    if prod((target.pp, target.dp_replicate, target.dp_shard, target.cp, target.tp)) <= 8:
        return [above_one(**asdict(target))]
    found = []
    names = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "etp")
    for sizes in product((1, 2, 4), repeat=7):
        pp, *stage = sizes[:5]
        fits = 1 < pp * prod(stage) <= 8 and prod(stage) % (sizes[5] * sizes[6]) == 0
        if fits and all(size <= getattr(target, name) for name, size in zip(names, sizes, strict=True)):
            found.append(above_one(*sizes))
    return found


@pytest.mark.parametrize("seed", range(40))
def test_every_three_axes_that_fit_stand_together(seed: int) -> None:
    target = random_target(seed)
    covered = cover(target, has_experts=True)
    together = [above_one(**asdict(sizes)) for sizes in covered.layouts]
    possible = possible_by_hand(target)
    assert set(covered.active) == above_one(**asdict(target))
    never = [set(axes) for axes in covered.never_together]
    for count in (1, 2, 3):
        for axes in map(set, combinations(covered.active, count)):
            if any(axes <= held for held in possible if held <= set(covered.active)):
                assert any(axes <= held for held in together), axes
            elif count > 1:
                assert any(told <= axes for told in never), axes


@pytest.mark.parametrize("seed", range(40))
def test_sublayouts_are_small_and_have_no_axis_that_the_target_has_not(seed: int) -> None:
    target = random_target(seed)
    covered = cover(target, has_experts=True)
    for sizes in covered.layouts:
        assert 1 < sizes.world <= 8
        assert sizes.world // sizes.pp % (sizes.ep * sizes.etp) == 0
        assert all(getattr(sizes, axis) <= getattr(target, axis) for axis in AXES)
        assert set(active_axes(sizes, has_experts=True)) <= set(covered.active)
    assert covered == cover(target, has_experts=True)


def test_what_was_never_together_is_told_in_its_smallest_form() -> None:
    covered = cover(Sizes(pp=2, dp_shard=2, cp=2, tp=2), has_experts=False)
    assert covered.never_together == (frozenset({"pp", "dp_shard", "cp", "tp"}),)
    assert len(covered.layouts) == 4  # each set of three fills all 8 ranks


def test_a_layout_that_fits_stands_for_itself() -> None:
    target = Sizes(dp_shard=3, tp=2, ep=3)
    assert cover(target, has_experts=True).layouts == (target,)


def test_seven_axes_need_ten_sublayouts() -> None:
    # Five dense axes make ten sets of three, and 8 ranks hold one of them at a time: no fewer can do.
    target = Sizes(pp=8, dp_replicate=2, dp_shard=8, cp=4, tp=8, ep=16, etp=2)
    assert len(cover(target, has_experts=True).layouts) == 10


def test_ranks_that_are_left_over_make_an_axis_longer() -> None:
    assert cover(Sizes(cp=16), has_experts=False).layouts == (Sizes(cp=4),)
    assert cover(Sizes(dp_shard=8, tp=8), has_experts=False).layouts == (Sizes(dp_shard=2, tp=4),)


def test_copies_of_the_experts_count_as_an_axis() -> None:
    covered = cover(Sizes(dp_shard=64, ep=8), has_experts=True)
    assert covered.active == ("dp_shard", "ep", "edp")
    assert covered.layouts == (Sizes(dp_shard=4, ep=2),)
    assert cover(Sizes(dp_shard=64), has_experts=False).active == ("dp_shard",)


def test_what_the_checks_refuse_is_left_out_and_told() -> None:
    target = Sizes(dp_shard=8, cp=8, tp=8)
    covered = cover(target, has_experts=False, accepts=lambda sizes: sizes.cp == 1 or sizes.tp == 1)
    assert covered.never_together == (frozenset({"cp", "tp"}),)
    assert {frozenset(active_axes(s, has_experts=False)) for s in covered.layouts} == {
        frozenset({"dp_shard", "cp"}),
        frozenset({"dp_shard", "tp"}),
    }


def test_an_axis_that_is_taken_off_leaves_room_for_the_experts_or_is_refused() -> None:
    assert without(Sizes(dp_shard=2, tp=2, ep=2), "tp") == Sizes(dp_shard=2, ep=2)
    assert without(Sizes(dp_shard=2, ep=2), "dp_shard") is None
    assert said(Sizes(dp_shard=2, ep=2)) == "dp_shard=2, ep=2"
    assert said(Sizes()) == "one process"
