"""Initial weights: every rule, every cut, every type; and bitwise the same in every layout and ZeRO stage."""

import math
from math import inf, nan
from typing import Any

import engine_cases
import pytest
import torch
from rank_pool import run_mesh
from torch import Tensor, nn

from meshwright.kernels.limits import USUAL
from meshwright.model.config import ModelConfig
from meshwright.model.feedforward.moe import Experts
from meshwright.model.parts import build_model
from meshwright.parallel.apply import Plan
from meshwright.parallel.initialise import ONES, ZEROS, InitPolicy, InitRule, fill, init_rules
from meshwright.parallel.mesh import Axis, Mesh, Sizes

NORMAL = InitRule("normal", 0.3)
SHAPE = (6, 5, 4)


def whole(
    rule: InitRule = NORMAL,
    dtype: torch.dtype = torch.float64,
    shape: tuple[int, ...] = SHAPE,
    at_once: int = USUAL.initial_weights,
) -> Tensor:
    held = torch.empty(shape, dtype=dtype)
    fill(held, rule, seed=3, name="w", global_shape=shape, offset=(0,) * len(shape), at_once=at_once)
    return held


@pytest.mark.parametrize(
    "cut",
    [
        (slice(2, 4), slice(0, 5), slice(0, 4)),  # rows
        (slice(0, 6), slice(1, 3), slice(0, 4)),  # dim 1
        (slice(0, 6), slice(0, 5), slice(3, 4)),  # dim 2
        (slice(1, 6), slice(2, 5), slice(0, 4)),  # two dims
        (slice(3, 5), slice(1, 4), slice(1, 3)),  # all three
        (slice(6, 6), slice(0, 5), slice(0, 4)),  # nothing
    ],
)
def test_a_part_holds_the_elements_of_the_whole(cut: tuple[slice, ...]) -> None:
    expected = whole()[cut]
    held = torch.full(expected.shape, math.nan, dtype=torch.float64)
    offset = tuple(part.start for part in cut)
    fill(held, NORMAL, seed=3, name="w", global_shape=SHAPE, offset=offset, at_once=7)  # ends in the middle of rows
    assert torch.equal(held, expected)


@pytest.mark.parametrize("kind", ["between", "log_of_uniform", "softplus_inverse", "column", "log_of_column"])
def test_every_rule_gives_a_part_the_elements_of_the_whole(kind: str) -> None:
    rule = InitRule(kind, 0.5, low=0.01, high=2.0)
    held = torch.empty(3, 4, 3, dtype=torch.float64)
    fill(held, rule, seed=3, name="w", global_shape=SHAPE, offset=(2, 1, 1), at_once=7)
    assert torch.equal(held, whole(rule)[2:5, 1:5, 1:4])


def test_rules_give_the_numbers_that_they_are_named_for() -> None:
    between, logs, steps = (
        whole(InitRule(kind, low=0.01, high=2.0), shape=(4000,))
        for kind in ("between", "log_of_uniform", "softplus_inverse")
    )
    assert torch.equal(logs, between.log())
    assert 0.01 <= between.min() < 0.02
    assert 1.99 < between.max() <= 2.0
    made = torch.nn.functional.softplus(steps).log()  # even from log(low) to log(high)
    assert made.mean().item() == pytest.approx((math.log(0.01) + math.log(2.0)) / 2, abs=0.1)
    assert made.std().item() == pytest.approx((math.log(2.0) - math.log(0.01)) / math.sqrt(12), abs=0.1)
    assert torch.equal(whole(InitRule("column", 0.5))[0, 0], torch.tensor([0.0, 0.5, 1.0, 1.5]).double())
    torch.testing.assert_close(whole(InitRule("log_of_column"))[1, 2].exp(), torch.arange(1.0, 5.0).double())


def test_pieces_do_not_change_the_elements() -> None:
    assert torch.equal(whole(at_once=11), whole())


def test_narrow_weights_are_rounded_from_wide_ones() -> None:
    exact = whole()
    assert torch.equal(whole(dtype=torch.float32), exact.to(torch.float32))
    # A bf16 weight and its fp32 master come from one number, so bf16 is rounded from fp32 and not from fp64.
    assert torch.equal(whole(dtype=torch.bfloat16), exact.to(torch.float32).to(torch.bfloat16))


def test_rules_have_the_distribution_that_they_say() -> None:
    n, shape = 60_000, (300, 200)
    normal, uniform = whole(NORMAL, shape=shape), whole(InitRule("uniform", 0.3), shape=shape)
    assert abs(normal.mean().item()) < 4 * 0.3 / math.sqrt(n)
    assert normal.std().item() == pytest.approx(0.3, rel=4 / math.sqrt(2 * n))
    assert abs(uniform.mean().item()) < 4 * 0.3 / math.sqrt(3 * n)
    assert uniform.std().item() == pytest.approx(0.3 / math.sqrt(3), rel=0.01)
    assert -0.3 < uniform.min().item() < -0.299
    assert 0.299 < uniform.max().item() < 0.3
    assert whole(ZEROS).unique().tolist() == [0.0]
    assert whole(ONES).unique().tolist() == [1.0]


def test_a_policy_gives_each_matrix_its_rule() -> None:
    h, f, v = 8, 32, 100
    assert InitPolicy().matrix(h, f) == InitRule("normal", 0.02)
    assert InitPolicy("scaled").matrix(h, f) == InitRule("normal", 8**-0.5)
    assert InitPolicy("xavier_uniform").matrix(h, f) == InitRule("uniform", math.sqrt(6 / 40))
    assert InitPolicy("xavier_normal").matrix(h, f) == InitRule("normal", math.sqrt(2 / 40))
    assert InitPolicy("xavier_normal").embedding(v, h) == InitRule("normal", math.sqrt(2 / 108))
    assert InitPolicy("scaled").embedding(v, h) == InitRule("normal", 8**-0.5)
    assert InitPolicy("xavier_uniform").embedding(v, h) == InitRule("uniform", math.sqrt(6 / 108))
    for kind in ("normal", "scaled", "xavier_uniform", "xavier_normal"):
        deep = InitPolicy(kind, residual_depth=16)
        assert deep.matrix(f, h, to_residual=True).scale == deep.matrix(f, h).scale / 4
        assert deep.matrix(f, h) == InitPolicy(kind).matrix(f, h)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        *(({"std": std}, f"std = {std}: must be at least 0 and finite; 0.02 would fit") for std in (-1.0, nan, inf)),
        ({"value_gain": nan}, "value_gain = nan: must be finite; 1.0 would fit"),
        ({"residual_depth": -4}, "residual_depth = -4: must be at least 0"),
    ],
)
def test_a_policy_of_no_weights_is_refused(wrong: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=f"^{line}$"):
        InitPolicy(**wrong)


def test_a_policy_of_no_known_kind_is_refused() -> None:
    policy = InitPolicy()
    object.__setattr__(policy, "kind", "foo")  # in a run of tests types are checked when it is made, elsewhere not
    line = "kind = 'foo': must be of 'normal', 'xavier_uniform', 'xavier_normal', 'scaled'"
    with pytest.raises(ValueError, match=f"^{line}$"):
        policy.__post_init__()


def test_depth_scaling_shrinks_what_is_written_to_the_residual_stream_only() -> None:
    rules = init_rules(build_model(engine_cases.moe_config(num_layers=2, init_std=0.5), device="meta"))
    shrunk = {name for name, rule in rules.items() if rule.scale == 0.5 / math.sqrt(4)}
    endings = ("mixer.part.output.weight", "experts.down", "shared.down.weight")
    assert shrunk == {name for name in rules if name.endswith(endings)}
    assert len(shrunk) == 6
    flat = init_rules(build_model(engine_cases.moe_config(init_depth_scaled=False), device="meta"))
    assert {rule.scale for name, rule in flat.items() if not name.endswith("norm.weight")} == {0.02}


def test_the_fan_in_of_a_split_expert_is_that_of_the_whole_matrix() -> None:
    for ep in (Axis("ep", 1, 0), Axis("ep", 4, 2)):
        rules = Experts(16, 64, 4, ep=ep, init=InitPolicy("scaled")).init_rules()
        assert {name: rule.scale for name, rule in rules.items()} == {"gate": 1 / 4, "up": 1 / 4, "down": 1 / 8}


def test_a_parameter_without_a_rule_is_named() -> None:
    with pytest.raises(ValueError, match=r"no initialisation rule for 0\.weight, 0\.bias"):
        init_rules(nn.Sequential(nn.Linear(2, 2)))


def initial_weights(
    mesh: Mesh, config: ModelConfig, stage: int, compute_dtype: torch.dtype | None
) -> dict[str, Tensor]:
    run = engine_cases.start(mesh, config, Plan(stage=stage, compute_dtype=compute_dtype), dtype=torch.float32)
    return {name: engine_cases.gather(part, part.parameter) for name, part in run.engine.parts.items()}


@pytest.mark.parametrize(
    ("sizes", "stage", "compute_dtype"),
    [
        (Sizes(dp_shard=2, ep=2), 0, None),
        (Sizes(dp_shard=2, ep=2), 1, torch.bfloat16),
        (Sizes(dp_shard=4, ep=2), 0, torch.bfloat16),
        (Sizes(dp_shard=4, ep=2), 1, None),
        (Sizes(dp_shard=4, ep=2), 2, torch.bfloat16),
        (Sizes(dp_shard=4, ep=2), 3, None),
    ],
)
def test_every_layout_and_stage_begins_with_bitwise_the_same_weights(
    sizes: Sizes, stage: int, compute_dtype: torch.dtype | None
) -> None:
    config = engine_cases.moe_config(num_layers=1, init="scaled", bias=("ffn", "q"))
    expected = dict(build_model(config, seed=5).named_parameters())
    for found in run_mesh(sizes, initial_weights, config, stage, compute_dtype):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            # bf16 weights have fp32 masters: the masters are what is filled, and not from rounded numbers.
            assert torch.equal(found[name], value.double()), name


def test_a_library_built_part_of_a_model_is_the_same_part() -> None:
    config = engine_cases.moe_config()
    expected = dict(build_model(config, seed=5).named_parameters())
    for rank, parts in enumerate(run_mesh(Sizes(dp_shard=2, ep=2), built_directly, config)):
        for name, part in parts.items():
            want = expected[name].chunk(2)[rank] if ".experts." in name else expected[name]
            assert torch.equal(part, want), name


def built_directly(mesh: Mesh, config: ModelConfig) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in build_model(config, seed=5, mesh=mesh).named_parameters()}
