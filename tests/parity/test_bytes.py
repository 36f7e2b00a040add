"""A step sends what the textbook says, to the byte, along every axis; nothing else is sent."""

from collections import Counter

import pytest
from parity_samples import Sample, sample
from rank_pool import run_mesh
from traffic_cases import LAYOUTS, Bytes, ep_bytes_of_all_ranks, etp_bytes, traffic_of_a_step

from meshwright.launcher.build import sizes_of


def sent_by_ranks(drawn: Sample) -> list[Bytes]:
    return run_mesh(sizes_of(drawn.run_file(), drawn.world), traffic_of_a_step, drawn)


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_axis_sends_what_the_textbook_says(name: str) -> None:
    for rank, sent in enumerate(sent_by_ranks(LAYOUTS[name][0])):
        assert sent == LAYOUTS[name][1](rank)


def test_expert_parallelism_sends_the_rows_that_leave_four_times() -> None:
    drawn = sample("moe", dp_shard=2, ep=2)
    together: Bytes = sum(sent_by_ranks(drawn), Counter())
    assert together["ep", "all_to_all"] == ep_bytes_of_all_ranks(drawn, 2)
    assert {key for key in together if key != ("ep", "all_to_all")} == {("ep", "all_reduce")}  # one group is both axes


def test_expert_tensor_parallelism_gathers_and_sums_everyones_rows() -> None:
    drawn = sample("moe", dp_shard=2, etp=2)
    for sent in sent_by_ranks(drawn):
        moved = Counter({key: count for key, count in sent.items() if key[1] != "all_reduce"})
        assert moved == etp_bytes(drawn, 2)
