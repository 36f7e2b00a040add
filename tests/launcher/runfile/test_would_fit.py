"""What a message says would fit goes with the whole run file, not only with the rule that was broken."""

from typing import Any

import pytest
from runfile_cases import MOE, run_file

from meshwright.launcher.runfile.cross_checks import check, check_on_any_world
from meshwright.launcher.runfile.would_fit import keys_of

WIDE = {**MOE, "moe": {"num_experts": 12, "expert_hidden_size": 40}}


@pytest.mark.parametrize(
    ("tables", "world_size", "key", "fits"),
    [
        # 2 is a multiple of the period, and would leave the third stage without a layer.
        ({"model": {"num_layers": 3, "pattern": "*--"}, "parallel": {"pp": 3}}, 3, "model.num_layers", "[4]"),
        ({"model": {"num_layers": 3, "pattern": "*--"}, "parallel": {"pp": 8}}, 8, "model.num_layers", "[8]"),
        ({"model": {"num_layers": 5, "pattern": "*--"}}, 1, "model.num_layers", "[4, 6]"),
        (
            {"model": {"num_layers": 3, "pattern": "*--"}, "recompute": {"mode": "full", "every": 3}},
            1,
            "model.num_layers",
            "[4]",
        ),
        # 3 divides the 6 heads, and does not go with tp = 2.
        (
            {"model": {"num_heads": 6, "num_kv_heads": 4, "head_dim": 8}, "parallel": {"tp": 2}},
            2,
            "model.num_kv_heads",
            "[1, 2, 6]",
        ),
        ({"model": {"hidden_size": 60, "num_heads": 8, "head_dim": 0}, "parallel": {"tp": 2}}, 2, "model.num_heads",
            "[2, 6, 10, 30]"),
        # 4 divides the 40, and leaves the experts of ep = 4 no ranks.
        ({"model": WIDE, "parallel": {"etp": 3, "ep": 4}}, 8, "parallel.etp", "[1, 2]"),
        # No etp goes with ep = 5, which must change anyhow: those beside which another ep would.
        ({"model": WIDE, "parallel": {"etp": 3, "ep": 5}}, 8, "parallel.etp", "[1, 2, 4, 8]"),
        ({"parallel": {"tp": 8}, "model": {"num_heads": 12, "num_kv_heads": 12, "head_dim": 8}}, 8, "parallel.tp",
            "[1, 2, 4]"),
        # With a given dp_shard another tp asks for another dp_shard; that is told then.
        ({"parallel": {"tp": 8, "dp_shard": 1}}, 8, "parallel.tp", "[1, 2, 4]"),
    ],
)  # fmt: skip
def test_sizes_that_are_said_to_fit_go_with_the_rest(
    tables: dict[str, Any], world_size: int, key: str, fits: str
) -> None:
    line = next(line for line in check(run_file(**tables), world_size) if line.startswith(f"{key} = "))
    assert line.endswith(f"; one of {fits} would fit")


@pytest.mark.parametrize(
    ("tables", "line"),
    [
        (
            {"model": {"num_layers": 1}, "recompute": {"mode": "full", "every": 3}},
            "recompute.every = 3: must not exceed model.num_layers = 1; 1 would fit",
        ),
        (
            {"model": {"num_layers": 1}, "parallel": {"pp": 2}},
            "parallel.pp = 2: makes 2 stages, and model.num_layers = 1 gives each at least one layer; 1 would fit",
        ),
        (
            {"model": {"num_layers": 3}, "parallel": {"pp": 3}, "pipeline": {"schedule": "interleaved_1f1b"}},
            "parallel.pp = 3: makes 6 stages (2 on each rank), and model.num_layers = 3 gives each at least one layer;"
            ' 1, or pipeline.schedule = "1f1b", would fit',
        ),
        # 1f1b holds one stage on a rank, so that it would not go with two that are asked for.
        (
            {
                "model": {"num_layers": 3},
                "parallel": {"pp": 3},
                "pipeline": {"schedule": "interleaved_1f1b", "stages_per_rank": 2},
            },
            "parallel.pp = 3: makes 6 stages (2 on each rank), and model.num_layers = 3 gives each at least one layer;"
            " 1 would fit",
        ),
        (
            {"model": {"pattern": "20000(*-)"}},
            'model.num_layers = 2: must be a multiple of the 20000 layers of model.pattern = "20000(*-)"; a pattern'
            " of at most 16384 layers would fit",
        ),
        (
            {"model": {**MOE, "moe": {"num_experts": 1, "top_k": 2}}},
            "model.moe.top_k = 2: must not exceed model.moe.num_experts = 1; 1 would fit",
        ),
    ],
)
def test_a_single_size_that_would_fit_is_named_by_itself(tables: dict[str, Any], line: str) -> None:
    assert check_on_any_world(run_file(**tables)) == [line]


def test_no_world_is_said_to_fit_axes_that_the_model_does_not_take() -> None:
    found = check(run_file(model={"num_heads": 8}, parallel={"tp": 3}, data={"seq_len": 48}), 8)
    assert found == [
        "parallel.tp = 3: must divide model.num_heads = 8; one of [1, 2, 4, 8] would fit",
        "parallel.tp = 3: tp * pp * cp * dp_replicate = 3 must divide the world size 8; parallel.tp of [1, 2, 4, 8]"
        " would fit",
    ]


def test_the_keys_of_a_problem_are_those_that_stand_before_its_rule() -> None:
    assert keys_of("parallel.etp = 5, parallel.ep = 3: ep * etp = 15 must divide") == {"parallel.etp", "parallel.ep"}
    assert keys_of("model.moe.top_k = 3: must not exceed model.moe.num_experts = 2") == {"model.moe.top_k"}
