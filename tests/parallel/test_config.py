"""The layout's tables say what a world cannot hold, and what would fit."""

from typing import Any

import pytest

from meshwright.parallel.config import ParallelConfig, RecomputeConfig


def problems(world_size: int, **keys: Any) -> list[str]:
    return ParallelConfig.model_validate(keys).problems(world_size)


@pytest.mark.parametrize("keys", [{}, {"ep": 2}, {"ep": 4}, {"dp_shard": 8}, {"ep": 8, "dp_shard": 8}])
def test_a_layout_of_eight_ranks_fits(keys: dict[str, int]) -> None:
    assert problems(8, **keys) == []


def test_axes_that_do_not_divide_the_world_are_named() -> None:
    assert problems(6, tp=4) == [
        "parallel.tp = 4: tp * pp * cp * dp_replicate = 4 must divide the world size 6;"
        " parallel.tp of [1, 2, 3, 6] or a world size of [4, 8] would fit"
    ]
    assert problems(4, pp=2, dp_replicate=3) == [
        "parallel.pp = 2, parallel.dp_replicate = 3: tp * pp * cp * dp_replicate = 6 must divide the world size 4;"
        " parallel.dp_replicate of [1, 2] or a world size of [6] would fit"
    ]
    assert problems(4, tp=3, dp_shard=2)[0].endswith("; parallel.tp of [2] or a world size of [6] would fit")
    assert problems(5, tp=3, cp=4, ep=8)[0].endswith("; a world size of [24] would fit")
    # A world that makes up the axes, and leaves the experts no ranks, would be refused next.
    assert problems(4, tp=3, dp_shard=1, ep=2)[0].endswith("; parallel.tp of [4] would fit")
    assert problems(6, tp=4, dp_shard=2, ep=3)[0].endswith("; parallel.tp of [3] would fit")
    assert problems(5, tp=2**20, cp=2**20)[0].endswith("; smaller sizes would fit")


def test_only_sizes_that_go_with_the_model_are_said_to_fit() -> None:
    layout = ParallelConfig(tp=5, etp=5)
    found = layout.problems(12, suits=lambda other: other.tp in (2, 4, 5, 7) and other.etp in (3, 5, 8))
    assert found == [
        "parallel.tp = 5: tp * pp * cp * dp_replicate = 5 must divide the world size 12;"
        " parallel.tp of [2, 4] or a world size of [10, 15] would fit",
        "parallel.etp = 5: ep * etp = 5 must divide the 12 ranks of a stage (world size 12 / pp); one of [3] would fit",
    ]


def test_a_dp_shard_that_does_not_make_the_world_says_which_would() -> None:
    assert problems(8, dp_shard=4) == [
        "parallel.dp_shard = 4: tp * pp * cp * dp_replicate * dp_shard = 4 must be the world size 8;"
        " 8 or 0 (what remains) would fit"
    ]


def test_an_ep_that_does_not_divide_the_ranks_says_which_would() -> None:
    assert problems(6, ep=4) == [
        "parallel.ep = 4: ep * etp = 4 must divide the 6 ranks of a stage (world size 6 / pp);"
        " one of [1, 2, 3, 6] would fit"
    ]


def test_an_etp_beside_which_no_ep_would_fit_is_the_one_that_is_named() -> None:
    assert problems(2, etp=5) == [
        "parallel.etp = 5: ep * etp = 5 must divide the 2 ranks of a stage (world size 2 / pp); one of [1, 2] would fit"
    ]
    assert problems(4, ep=3, etp=5) == [
        "parallel.etp = 5, parallel.ep = 3: ep * etp = 15 must divide the 4 ranks of a stage (world size 4 / pp);"
        " 1 for each would fit"
    ]


def test_what_remains_of_the_world_is_data_parallel() -> None:
    layout = ParallelConfig(ep=4)
    assert (layout.dp_shard_in(8), layout.dp_in(8), layout.edp_in(8)) == (8, 8, 2)


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"mode": "full", "every": 5}, "recompute.every = 5: must not exceed model.num_layers = 4"),
        ({"mode": "selective", "every": 2}, 'recompute.every = 2: counts only with recompute.mode = "full"'),
        ({"mode": "selective", "save": []}, "recompute.save = []"),
        ({"mode": "full", "save": ["matmul"]}, 'recompute.save = ["matmul"]: counts only with'),
        ({"mode": "modules", "save": ["matmul"]}, 'recompute.mode = "selective", and the mode is "modules"; leave it'),
        (
            {"mode": "full", "modules": ["mixer"]},
            'recompute.modules = ["mixer"]: counts only with recompute.mode = "modules"',
        ),
        ({"mode": "modules", "every": 2}, 'recompute.every = 2: counts only with recompute.mode = "full"'),
        ({"mode": "modules", "modules": []}, 'recompute.modules = []: mode = "modules" must recompute something'),
        ({"mode": "modules", "modules": ["experts", "feedforward"]}, "experts stand within the feedforward"),
    ],
)
def test_recompute_keys_that_cannot_be_honoured_are_named(keys: dict[str, Any], part: str) -> None:
    found = RecomputeConfig.model_validate(keys).problems(num_layers=4)
    assert len(found) == 1
    assert part in found[0]


def test_mode_none_turns_the_other_recompute_keys_off_without_a_word() -> None:
    keys = {"every": 9, "save": [], "modules": []}
    assert RecomputeConfig.model_validate(keys).problems(num_layers=4) == []


def test_offload_stands_with_every_mode() -> None:
    for mode in ("none", "full", "selective", "modules"):
        assert RecomputeConfig.model_validate({"mode": mode, "offload": True}).problems(num_layers=4) == []
