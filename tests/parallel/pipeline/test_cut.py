"""Stacks are cut so that the costliest stage costs least: held to every possible cut of small stacks."""

import random
from itertools import combinations

import pytest

from meshwright.parallel.pipeline.cut import cut_layers


def costliest(costs: list[float], stages: list[range], first: float, last: float) -> float:
    sums = [sum(costs[at] for at in stage) for stage in stages]
    sums[0] += first
    sums[-1] += last
    return max(sums)


def every_cut(layers: int, stages: int) -> list[list[range]]:
    return [
        [range(begin, end) for begin, end in zip((0, *inner), (*inner, layers), strict=True)]
        for inner in combinations(range(1, layers), stages - 1)
    ]


def test_no_other_cut_is_better() -> None:
    draw = random.Random(0)
    for _ in range(200):
        costs = [draw.choice([1.0, 2.0, 5.0, 0.0]) for _ in range(draw.randint(1, 9))]
        stages = draw.randint(1, len(costs))
        first, last = draw.choice([0.0, 3.0]), draw.choice([0.0, 4.0, 9.0])
        found = cut_layers(costs, stages, first_extra=first, last_extra=last)
        assert [at for stage in found for at in stage] == list(range(len(costs)))
        assert len(found) == stages and all(found)
        best = min(costliest(costs, cut, first, last) for cut in every_cut(len(costs), stages))
        assert costliest(costs, found, first, last) == best


def test_the_cut_of_the_module_docstring_is_right() -> None:
    assert [len(stage) for stage in cut_layers([3.0] * 6, 3, last_extra=4.0)] == [2, 3, 1]


def test_equal_layers_are_cut_evenly() -> None:
    assert cut_layers([1.0] * 8, 4) == [range(2), range(2, 4), range(4, 6), range(6, 8)]


@pytest.mark.parametrize("stages", [0, 4])
def test_more_stages_than_layers_are_refused(stages: int) -> None:
    with pytest.raises(ValueError, match=f"3 layers make no {stages} stages"):
        cut_layers([1.0] * 3, stages)
