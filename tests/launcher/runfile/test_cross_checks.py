"""What needs several tables to be seen is told with sizes that would fit; and those sizes do fit."""

import re
from typing import Any

import pytest
from runfile_cases import MOE, run_file

from meshwright.launcher.runfile.cross_checks import check, check_on_any_world


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_a_sound_run_has_no_problems(world_size: int) -> None:
    assert check(run_file(), world_size) == []


def test_experts_on_ranks_that_divide_them_have_no_problems() -> None:
    assert check(run_file(model=MOE, parallel={"ep": 4}, zero={"stage": 2}), 8) == []


@pytest.mark.parametrize(
    ("tables", "world_size", "line"),
    [
        (
            {"train": {"global_batch_size": 18, "micro_batch_size": 2}},
            4,
            "train.global_batch_size = 18: must be a multiple of the 4 data-parallel ranks; one of [16, 20] would fit",
        ),
        (
            {"train": {"batch_ramp": [{"samples": 9, "global_batch_size": 3}]}},
            4,
            "train.batch_ramp[0].global_batch_size = 3: must be a multiple of the 4 data-parallel ranks;"
            " one of [4] would fit",
        ),
        (
            {"train": {"batch_ramp": [{"samples": n, "global_batch_size": 12} for n in (8, 4)]}},
            4,
            "train.batch_ramp[1].samples = 4: must be above the 8 of the entry before it; sort the list",
        ),
        (
            {"model": MOE, "parallel": {"ep": 8}},
            8,
            "parallel.ep = 8: must divide model.moe.num_experts = 12; one of [1, 2, 4] would fit",
        ),
        (
            {"parallel": {"ep": 2}},
            2,
            "parallel.ep = 2: splits experts, and the model has none (no table [model.moe]); 1 would fit",
        ),
        *(
            (
                {"train": {"skip_norm_spike": multiple}},
                1,
                f"train.skip_norm_spike = {multiple}: must be 0 or at least 1, or most steps would be skipped: half of"
                " them are above their median; 0 (off), or 5 to 20, would fit",
            )
            for multiple in (1e-09, 0.5)
        ),
        (
            {"learning_rate": {"warmup_steps": 10, "warmup_fraction": 0.1}},
            1,
            "learning_rate.warmup_steps = 10: must not stand beside learning_rate.warmup_fraction = 0.1;"
            " leave one of them out",
        ),
        (
            {"checkpoint": {"keep_every": 100}},
            1,
            "checkpoint.keep_every = 100: needs checkpoint.every, which is 0; checkpoint.every = 100 would fit",
        ),
        (
            {"checkpoint": {"every": 30, "keep_every": 100}},
            1,
            "checkpoint.keep_every = 100: must be a multiple of checkpoint.every = 30; one of [90, 120] would fit",
        ),
        (
            {"init": {"load": "weights+optimizer"}},
            1,
            'init.load = "weights+optimizer": needs a checkpoint to load, and init.from is empty;'
            " name a folder in init.from, or leave it out",
        ),
        ({"run": {"device": "mps"}}, 2, 'run.device = "mps": is for one process, and the world size is 2; 1 would fit'),
        (
            {"run": {"device": "mps"}, "train": {"precision": "fp64"}},
            1,
            'train.precision = "fp64": on run.device = "mps" there are no 64-bit numbers; "fp32" would fit',
        ),
        (
            {"run": {"device": "mps"}, "train": {"precision": "bf16"}},
            1,
            'train.precision = "bf16": on run.device = "mps" no fp32 masters; "bf16_autocast" or "fp32" would fit',
        ),
        (
            {"run": {"device": "mps"}, "train": {"compile": True}},
            1,
            'train.compile = true: on run.device = "mps" torch.compile is not offered; false would fit',
        ),
        (
            {"run": {"device": "mps"}, "zero": {"stage": 1}},
            1,
            'zero.stage = 1: on run.device = "mps" there is one process, and nothing to split; 0 would fit',
        ),
        (
            {"run": {"device": "mps"}, "recompute": {"offload": True}},
            1,
            'recompute.offload = true: on run.device = "mps" all memory is the host\'s; false would fit',
        ),
        (
            {"recompute": {"mode": "modules", "modules": ["experts"]}},
            1,
            'recompute.modules = ["experts"]: no layer of model.pattern = "*-" has "experts";'
            ' one of ["norm", "activation", "mixer", "feedforward"] would fit',
        ),
        (
            {
                "model": {"pattern": "*"},
                "recompute": {"mode": "modules", "modules": ["norm", "activation", "experts", "mixer"]},
            },
            1,
            'recompute.modules = ["norm", "activation", "experts", "mixer"]: no layer of model.pattern = "*" has'
            ' "activation" or "experts"; one of ["norm", "mixer"] would fit',
        ),
        (
            {"model": {"multi_token": {"depth": 8}}, "data": {"seq_len": 8}},
            1,
            "model.multi_token.depth = 8: must be below data.seq_len = 8, as no token of a sample has one so far"
            " behind it; 1 to 7 would fit",
        ),
        (
            {"model": {"multi_token": {}}, "data": {"seq_len": 1}},
            1,
            "model.multi_token.depth = 1: must be below data.seq_len = 1, as no token of a sample has one so far"
            " behind it; leave the table out",
        ),
        (
            {"model": {"pattern": "S*-"}, "parallel": {"cp": 2}},
            2,
            "parallel.cp = 2: S4D convolves whole samples; 1 would fit",
        ),
        (
            {"train": {"compile": True}, "recompute": {"offload": True}},
            1,
            "train.compile = true: is not possible with recompute.offload in this version; false, or"
            " recompute.offload = false, would fit",
        ),
    ],
)
def test_tables_that_do_not_go_together_are_told(tables: dict[str, Any], world_size: int, line: str) -> None:
    assert check(run_file(**tables), world_size) == [line]


@pytest.mark.parametrize(
    ("tables", "begins"),
    [
        (
            {"learning_rate": {"warmup_steps": 101}},
            "learning_rate.warmup_steps = 101: must not exceed train.steps = 100",
        ),
        ({"learning_rate": {"schedule": "wsd", "warmup_steps": 90}}, "learning_rate.decay_fraction = 0.2"),
        ({"recompute": {"mode": "full", "every": 3}}, "recompute.every = 3: must not exceed model.num_layers = 2"),
        ({"model": {"num_kv_heads": 3}}, "model.num_kv_heads = 3: must divide"),
    ],
)
def test_what_one_table_finds_is_told_too(tables: dict[str, Any], begins: str) -> None:
    found = check(run_file(**tables), 1)
    assert len(found) == 1
    assert found[0].startswith(begins)


@pytest.mark.parametrize(
    ("parallel", "told"),
    [
        ({"tp": 8}, "parallel.tp = 8: tp * pp * cp * dp_replicate = 8 must divide the world size 4;"
            " parallel.tp of [1, 2, 4] would fit"),
        ({"dp_replicate": 3}, "parallel.dp_replicate = 3: tp * pp * cp * dp_replicate = 3 must divide"),
        ({"dp_shard": 3}, "parallel.dp_shard = 3: tp * pp * cp * dp_replicate * dp_shard = 3 must be"),
    ],
)  # fmt: skip
def test_a_batch_is_held_against_ranks_that_are_known(parallel: dict[str, int], told: str) -> None:
    """With other axes other sizes would fit, so nothing is said of the batch before they are right."""
    found = check(run_file(train={"global_batch_size": 7}, parallel=parallel), 4)
    assert any(line.startswith(told) for line in found)
    assert not any(line.startswith("train.global_batch_size") for line in found)


def test_only_a_pp_that_leaves_the_experts_their_ranks_is_said_to_fit() -> None:
    odd = run_file(model=MOE | {"num_layers": 4}, parallel={"pp": 3, "ep": 4}, train={"global_batch_size": 8})
    told = "parallel.pp = 3: tp * pp * cp * dp_replicate = 3 must divide the world size 8; parallel.pp of [1, 2] or"
    assert any(line.startswith(told) for line in check(odd, 8))


def test_only_an_ep_that_divides_the_experts_is_said_to_fit() -> None:
    odd = run_file(model=MOE, train={"global_batch_size": 20}, parallel={"ep": 4})
    assert check(odd, 10) == [
        "parallel.ep = 4: ep * etp = 4 must divide the 10 ranks of a stage (world size 10 / pp);"
        " one of [1, 2] would fit"
    ]


def test_what_is_on_mps_is_refused_by_name_all_at_once() -> None:
    train = {"precision": "fp64", "compile": True}
    odd = run_file(model=MOE, run={"device": "mps"}, train=train, zero={"stage": 3}, parallel={"ep": 2})
    found = check(odd, 2)
    assert [line.partition(" =")[0] for line in found] == [
        "train.precision",
        "train.compile",
        "zero.stage",
        "parallel.ep",
        "run.device",
    ]


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "noisy"])
def test_one_expert_of_each_token_with_a_weight_that_is_always_1_is_refused(router: str) -> None:
    def told(init: dict[str, Any] | None = None, **moe: Any) -> list[str]:
        return check(run_file(model=MOE | {"moe": {"router": router, "top_k": 1, **moe}}, init=init or {}), 1)

    (line,) = told()
    assert line == (
        "model.moe.top_k = 1: with model.moe.normalise_top_k = true a token's one weight is always 1, whatever its"
        " score, and the router learns nothing from the loss; 2 or more, or model.moe.normalise_top_k = false, would"
        " fit"
    )
    assert told({"from": "x", "upcycle": "copy"})[0].endswith("; 2 or more would fit")
    for way_out in ({"top_k": 2}, {"normalise_top_k": False}, {"num_experts": 1}):
        assert told(**way_out) == []
    for other in ("switch", "sinkhorn", "expert_choice"):
        assert told(router=other) == []


def test_without_a_world_only_what_no_layout_could_mend_is_told() -> None:
    odd = run_file(train={"global_batch_size": 7}, parallel={"dp_shard": 5, "tp": 16})
    assert all(line.startswith("parallel.tp = 16: must divide model.") for line in check_on_any_world(odd))
    assert len(check(odd, 4)) > 1


@pytest.mark.parametrize("world_size", range(1, 9))
@pytest.mark.parametrize("size", range(1, 30, 4))
def test_a_batch_size_that_is_said_to_fit_fits(world_size: int, size: int) -> None:
    for line in check(run_file(train={"global_batch_size": size, "micro_batch_size": 3}), world_size):
        fits = [int(text) for text in re.findall(r"\d+", line.partition("one of [")[2].partition("]")[0])]
        assert fits
        for fit in fits:
            assert check(run_file(train={"global_batch_size": fit, "micro_batch_size": 3}), world_size) == []


@pytest.mark.parametrize(
    ("tables", "fits"),
    [
        ({}, 1),
        ({"parallel": {"tp": 2, "cp": 2}}, 4),
        ({"parallel": {"dp_shard": 3}}, 3),
        ({"model": MOE, "parallel": {"tp": 2, "ep": 3}}, 6),
        ({"model": MOE, "parallel": {"etp": 2, "ep": 2, "dp_shard": 4}}, 4),
    ],
)
def test_no_world_is_empty_and_one_that_fits_is_named(tables: dict[str, Any], fits: int) -> None:
    for world_size in (0, -2):
        told = [f"world size = {world_size}: must be at least 1; {fits} would fit"]
        assert check(run_file(**tables), world_size) == told
    assert check(run_file(**tables), fits) == []


def test_a_world_is_named_only_where_there_is_one() -> None:
    # Of 2 ranks, as dp_shard says, there are none for the experts' 4.
    odd = run_file(model=MOE, parallel={"ep": 4, "dp_shard": 2})
    assert check(odd, 0) == ["world size = 0: must be at least 1"]


def test_without_a_world_the_rest_is_told_too() -> None:
    assert [line.partition(" =")[0] for line in check(run_file(parallel={"tp": 3}), 0)] == [
        "world size",
        "parallel.tp",
        "data.seq_len",
    ]


def test_what_is_wrong_with_the_model_hides_nothing_of_the_layout_and_of_the_optimizer() -> None:
    sizes = {"num_layers": 9, "pattern": "*--", "num_heads": 5, "hidden_size": 40, "ffn_hidden_size": 13}
    groups = ({"match": "layers.8.mixer.norm.weight"}, {"match": "layers.8.mixing.*"})
    odd = run_file(model={**sizes, "head_dim": 0}, parallel={"tp": 4}, optimizer={"groups": groups})
    assert [line.partition(";")[0].partition(", whose")[0] for line in check(odd, 4)] == [
        'model.num_layers = 9: must be a multiple of the 2 layers of model.pattern = "*--"',
        "model.num_kv_heads = 2: must divide model.num_heads = 5",
        "parallel.tp = 4: must divide model.num_heads = 5",
        "parallel.tp = 4: must divide model.ffn_hidden_size = 13",
        'optimizer.groups[1].match = "layers.8.mixing.*": matches no parameter',
    ]


@pytest.mark.parametrize("pattern", ["*?", "", "*E", "M-]"])
def test_layers_that_cannot_be_known_are_the_pattern_s_problem_alone(pattern: str) -> None:
    odd = run_file(model={"pattern": pattern}, parallel={"tp": 2}, optimizer={"groups": ({"match": "no.*"},)})
    (line,) = check(odd, 2)
    assert line.startswith("model.pattern = ")


@pytest.mark.parametrize("further", [{}, {"multi_token": {}}])
def test_a_layer_beyond_the_stack_hides_nothing_else(further: dict[str, Any]) -> None:
    model = {"pattern": "*- @5 *", "num_heads": 5, "head_dim": 16, "num_kv_heads": 5, "distinct_layers": 1}
    groups = ({"match": "layers.0.mixer.*"}, {"match": "no.*"})
    odd = run_file(model={**model, **further}, parallel={"tp": 4, "pp": 2}, optimizer={"groups": groups})
    assert [line.partition(";")[0].partition(", whose")[0] for line in check(odd, 8)] == [
        'model.pattern = "*- @5 *": layer 5 is none of model.num_layers = 2',
        "parallel.tp = 4: must divide model.num_heads = 5",
        "parallel.pp = 2: would spread the uses of shared weights (model.distinct_layers = 1) over stages",
        'optimizer.groups[1].match = "no.*": matches no parameter',
    ]


def test_places_and_a_period_that_do_not_go_with_the_layers_are_both_told() -> None:
    found = check(run_file(model={"pattern": "*--  @99999 *", "num_layers": 3}), 1)
    assert [line.partition(";")[0].partition(": ")[2] for line in found] == [
        "layer 99999 is none of model.num_layers = 3",
        'must be a multiple of the 2 layers of model.pattern = "*--  @99999 *"',
    ]
