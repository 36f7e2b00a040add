"""A step sends what the textbook says, to the byte, along every axis; nothing else is sent."""

import pytest
from parity_samples import Sample
from rank_pool import run_mesh
from traffic_cases import LAYOUTS, LONGER, Bytes, traffic_of_a_step

from meshwright.launcher.build import sizes_of


def sent_by_ranks(drawn: Sample) -> list[Bytes]:
    return run_mesh(sizes_of(drawn.run_file(), drawn.world), traffic_of_a_step, drawn)


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_axis_sends_what_the_textbook_says(name: str) -> None:
    for rank, sent in enumerate(sent_by_ranks(LAYOUTS[name][0])):
        assert sent == LAYOUTS[name][1](rank)


# Most need more ranks than the other tests of a default run start.
OFTEN = ("cp 3, ring", "dp 4, ZeRO-1", "dp 4, ZeRO-3", "ep 4", "pp 4")


@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in LONGER]
)
def test_a_longer_axis_sends_what_the_textbook_says(name: str) -> None:
    for rank, sent in enumerate(sent_by_ranks(LONGER[name][0])):
        assert sent == LONGER[name][1](rank)
