"""A narrow run is small and keeps every feature and every relation that an axis can break."""

import random
from math import prod
from pathlib import Path

import pytest

from meshwright.launcher.build import sizes_of
from meshwright.launcher.proof.narrow import STEPS, alone, narrow, on_layout
from meshwright.launcher.proof.prove import plan_proof
from meshwright.launcher.proof.sublayouts import candidates, cover
from meshwright.launcher.runfile.cross_checks import check
from meshwright.launcher.runfile.read import read_run_file
from meshwright.launcher.runfile.tables import RunFile
from meshwright.model.config import ModelConfig
from meshwright.model.pattern import parse_pattern
from meshwright.parallel.mesh import Sizes

RUNS = Path(__file__).resolve().parents[3] / "runs"


def run_file_of(model: dict[str, object], **tables: object) -> RunFile:
    base: dict[str, object] = {
        "run": {"name": "x"},
        "model": {"num_layers": 8, "hidden_size": 512, "num_heads": 16, "vocab_size": 1000} | model,
        "data": {"store": "none", "seq_len": 256},
        "train": {"steps": 1000, "global_batch_size": 64},
        "learning_rate": {"peak": 1e-3},
    }
    return RunFile.model_validate(base | tables)


def narrowed(model: dict[str, object], target: Sizes, layouts: list[Sizes] | None = None) -> ModelConfig:
    return narrow(run_file_of(model), target, layouts or candidates(target)).run_file.model


@pytest.mark.parametrize("name", sorted(path.name for path in RUNS.glob("*.toml")))
@pytest.mark.parametrize("world", [8, 64, 512])
def test_every_run_file_becomes_small_and_fits_on_its_sublayouts(name: str, world: int) -> None:
    run_file = read_run_file(RUNS / name, ["train.global_batch_size=1024", "train.batch_ramp=[]"], world_size=world)
    plan = plan_proof(run_file, world)
    small = plan.narrowed.run_file
    assert small.model.hidden_size <= 64
    assert small.data.seq_len <= 64
    for sizes in plan.cover.layouts:
        assert check(on_layout(small, sizes), sizes.world) == []
        part = small.train.global_batch_size // (sizes.dp_replicate * sizes.dp_shard)
        assert part >= 2, "each rank needs more than one sample"


@pytest.mark.parametrize(("seq_len", "axes"), [(6, {"cp": 3, "tp": 2}), (3, {"tp": 3}), (18, {"cp": 3})])
def test_no_axis_is_left_out_for_samples_that_only_the_large_layout_cuts_evenly(
    seq_len: int, axes: dict[str, int]
) -> None:
    tables = {"parallel": axes | {"dp_shard": 8}, "data": {"store": "x", "seq_len": seq_len}}
    run_file = run_file_of({"num_heads": 12, "num_kv_heads": 6, "head_dim": 8, "ffn_hidden_size": 96}, **tables)
    plan = plan_proof(run_file, 8 * prod(axes.values()))
    assert set(plan.cover.active) == {*axes, "dp_shard"}
    assert plan.cover.never_together == ()
    assert plan.narrowed.run_file.data.seq_len <= max(seq_len + 2, 8)


@pytest.mark.parametrize(
    ("width", "shared", "tp", "dp_shard"), [(9, 1, 3, 4), (48, 1, 3, 1), (10, 3, 3, 4), (10, 1, 5, 2), (24, 1, 6, 2)]
)
def test_no_axis_is_left_out_for_shared_experts_that_only_the_large_layout_cuts_evenly(
    width: int, shared: int, tp: int, dp_shard: int
) -> None:
    moe = {"num_experts": 4, "top_k": 2, "expert_hidden_size": width, "num_shared_experts": shared}
    model = {"num_heads": tp, "num_kv_heads": 1, "head_dim": 8, "hidden_size": 8 * tp, "pattern": "*E", "moe": moe}
    run_file = run_file_of(model, parallel={"tp": tp, "dp_shard": dp_shard}, data={"store": "x", "seq_len": 32 * tp})
    plan = plan_proof(run_file, tp * dp_shard)
    assert {"tp"} <= set(plan.cover.active)
    assert plan.cover.never_together == ()
    assert any(sizes.tp > 1 for sizes in plan.cover.layouts)


@pytest.mark.parametrize("seed", range(30))
def test_what_divides_goes_on_dividing_and_what_does_not_does_not(seed: int) -> None:
    draw = random.Random(seed)
    tp, ep, etp = draw.choice([1, 2, 4, 8]), draw.choice([1, 2, 8]), draw.choice([1, 2])
    kv_heads = draw.choice([1, 2, 4, 8, 16])
    vocab, experts = draw.choice([1000, 1001]), ep * draw.choice([1, 2, 3, 8])
    top_k = min(experts, draw.choice([1, 2, 4]))
    moe = {"num_experts": experts, "top_k": top_k, "expert_hidden_size": 96}
    target = Sizes(dp_shard=16, tp=tp, ep=ep, etp=etp)
    big = {"pattern": "*E", "num_kv_heads": kv_heads, "vocab_size": vocab, "moe": moe}
    layouts = [sizes for sizes in candidates(target) if sizes.tp in (1, 2)]
    small = narrowed(big, target, layouts)
    few = 2 if tp > 1 else 1  # the tp of its sub-layouts
    assert small.moe is not None
    assert (small.num_kv_heads < few) == (kv_heads < tp)
    assert (small.num_kv_heads == small.num_heads) == (kv_heads == 16)
    assert small.num_heads % max(small.num_kv_heads, few) == 0
    assert (small.vocab_size % few == 0) == (vocab % tp == 0)
    assert small.moe.num_experts % (2 if ep > 1 else 1) == 0
    assert (small.moe.top_k < small.moe.num_experts) == (top_k < experts)
    assert (small.moe.top_k == 1) == (top_k == 1)
    assert small.moe.expert_hidden_size % (8 * (2 if etp > 1 else 1)) == 0


@pytest.mark.parametrize(("pattern", "layers", "pp"), [("*-*-*-*-*E", 5, 5), ("*-*-*-*-*E*-*-", 7, 7)])
def test_a_long_period_becomes_a_short_one_that_still_fills_the_stages(pattern: str, layers: int, pp: int) -> None:
    moe = {"num_experts": 4, "top_k": 2, "expert_hidden_size": 64}
    run_file = run_file_of({"pattern": pattern, "num_layers": layers, "moe": moe}, parallel={"pp": pp})
    assert check(run_file, pp) == []
    small = plan_proof(run_file, pp).narrowed.run_file.model
    assert pp <= small.num_layers <= pp + 1
    assert set(small.layers) == set(run_file.model.layers)


def test_one_kv_head_on_two_ranks_and_two_on_four() -> None:
    assert narrowed({"num_kv_heads": 1}, Sizes(tp=2)).num_kv_heads == 1
    of_four = narrowed({"num_kv_heads": 2}, Sizes(tp=4))
    assert (of_four.num_heads, of_four.num_kv_heads) == (8, 2)
    # Where sub-layouts have tp = 2 as well, one head is what several ranks can share.
    assert narrowed({"num_kv_heads": 2}, Sizes(tp=8, dp_shard=8)).num_kv_heads == 1


def test_the_width_stays_what_the_heads_make_or_stays_another() -> None:
    equal, other = narrowed({}, Sizes(tp=2)), narrowed({"head_dim": 64}, Sizes(tp=2))
    assert equal.hidden_size == equal.num_heads * equal.head_dim
    assert other.hidden_size != other.num_heads * other.head_dim


@pytest.mark.parametrize(("heads", "head_dim"), [(6, 20), (8, 10), (3, 8), (5, 30), (12, 12)])
@pytest.mark.parametrize(("inner", "etp"), [(96, 4), (50, 1), (60, 2), (24, 2), (40, 1)])
@pytest.mark.parametrize("differs", [0, 8])
def test_a_ranks_width_is_aligned_where_the_models_is(
    heads: int, head_dim: int, inner: int, etp: int, differs: int
) -> None:
    moe = {"num_experts": 4, "top_k": 2, "expert_hidden_size": inner}
    big = {"num_heads": heads, "head_dim": head_dim, "hidden_size": heads * head_dim + differs, "pattern": "*E"}
    target = Sizes(dp_shard=16, etp=etp)
    small = narrowed(big | {"moe": moe}, target)
    assert small.moe is not None
    assert (small.hidden_size % 8 == 0) == (big["hidden_size"] % 8 == 0)
    for sizes in candidates(target):
        if sizes.etp > 1 or etp == 1:
            assert (small.moe.expert_hidden_size // sizes.etp % 8 == 0) == (inner // etp % 8 == 0)


def test_no_feature_is_turned_off() -> None:
    model = {
        "pattern": "*E",
        "qk_norm": True,
        "tie_embeddings": True,
        "bias": ["q", "ffn"],
        "init": "scaled",
        "moe": {
            "num_experts": 64, "top_k": 6, "expert_hidden_size": 128, "num_shared_experts": 4,
            "normalise_top_k": False, "load_balancing": "step",
        },
    }  # fmt: skip
    table = {"mode": "full", "every": 3}
    run_file = run_file_of(model, zero={"stage": 3}, recompute=table, data={"store": "x", "seq_len": 4096})
    small = narrow(run_file, Sizes(dp_shard=8, ep=8), [Sizes(dp_shard=8, ep=8)]).run_file
    sizes = {"num_experts", "top_k", "expert_hidden_size", "num_shared_experts"}
    assert small.model.moe is not None
    assert run_file.model.moe is not None
    assert small.model.moe.model_dump(exclude=sizes) == run_file.model.moe.model_dump(exclude=sizes)
    assert small.model.moe.num_shared_experts == 2
    shape = {"num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_hidden_size", "vocab_size"}
    assert small.model.model_dump(exclude=shape | {"moe"}) == run_file.model.model_dump(exclude=shape | {"moe"})
    assert (small.zero, small.recompute.mode, small.recompute.every) == (run_file.zero, "full", 1)
    assert small.data.mask_documents == run_file.data.mask_documents


def test_a_long_pattern_keeps_each_kind_of_layer_once() -> None:
    moe = {"num_experts": 8, "top_k": 2, "expert_hidden_size": 64}
    small = narrowed({"pattern": "2(*-)5(*E)-", "num_layers": 8, "moe": moe}, Sizes(dp_shard=2))
    assert set(parse_pattern(small.pattern)) == set(parse_pattern("2(*-)5(*E)-"))
    assert small.num_layers == 3


def test_there_are_layers_and_micro_batches_for_every_stage() -> None:
    run_file = run_file_of({}, pipeline={"schedule": "interleaved_1f1b", "stages_per_rank": 2})
    small = narrow(run_file, Sizes(pp=4), [Sizes(pp=4)]).run_file
    assert small.model.num_layers == 8
    assert check(on_layout(small, Sizes(pp=4)), 4) == []


def test_the_schedule_has_its_warm_up_and_its_peak_within_the_proof() -> None:
    rate = {"peak": 1e-3, "warmup_steps": 2000, "final_fraction": 0.0, "schedule": "linear"}
    small = narrow(run_file_of({}, learning_rate=rate), Sizes(dp_shard=2), [Sizes(dp_shard=2)]).run_file
    assert small.learning_rate.warmup_steps == 1
    assert small.train.steps == STEPS + 1  # so that no step that is compared has the last rate, which is 0 here


def test_each_changed_key_is_told_with_both_values() -> None:
    changes = narrow(run_file_of({}), Sizes(dp_shard=2), [Sizes(dp_shard=2)]).changes
    told = [str(change) for change in changes]
    assert "model.num_layers: 8 -> 2" in told
    assert 'data.store: "none" -> "counted"' in told
    assert len({change.key for change in changes}) == len(changes)
    assert all(change.before != change.after for change in changes)


@pytest.mark.parametrize(("of_run", "of_proof"), [(1.0, 0.01), (0.002, 0.002), (0.0, 0.0)])
def test_what_clips_clips_every_step_and_what_does_not_does_not(of_run: float, of_proof: float) -> None:
    run_file = run_file_of({}, train={"steps": 9, "global_batch_size": 8, "clip_norm": of_run})
    assert narrow(run_file, Sizes(dp_shard=2), [Sizes(dp_shard=2)]).run_file.train.clip_norm == of_proof


@pytest.mark.parametrize("ramp", [[], [{"samples": 640, "global_batch_size": 32}]])
@pytest.mark.parametrize("micro_batch", [1, 2, 64])
@pytest.mark.parametrize("sizes", [Sizes(tp=2), Sizes(dp_shard=2), Sizes(pp=2)])
def test_one_process_cuts_the_batch_as_no_rank_does(sizes: Sizes, micro_batch: int, ramp: list[object]) -> None:
    keys = {"steps": 9, "global_batch_size": 64, "micro_batch_size": micro_batch, "batch_ramp": ramp}
    small = narrow(run_file_of({}, train=keys), sizes, [sizes]).run_file
    batches = {small.train.global_batch_size, *(entry.global_batch_size for entry in small.train.batch_ramp)}
    for batch in batches:
        of_rank = min(small.train.micro_batch_size, batch // sizes.dp_shard)
        assert min(alone(small).train.micro_batch_size, batch) != of_rank
    assert check(alone(small), 1) == []


def test_one_process_recomputes_nothing_that_what_recomputing_does_shows() -> None:
    run_file = run_file_of({}, recompute={"mode": "selective"})
    small = narrow(run_file, Sizes(tp=2), [Sizes(tp=2)]).run_file
    assert (small.recompute.mode, alone(small).recompute.mode) == ("selective", "none")


def test_a_ramp_stays_a_ramp() -> None:
    train = {"steps": 9, "global_batch_size": 64, "batch_ramp": [{"samples": 640, "global_batch_size": 32}]}
    small = narrow(run_file_of({}, train=train), Sizes(dp_shard=2), [Sizes(dp_shard=2)]).run_file.train
    assert small.batch_ramp[0].samples == small.batch_ramp[0].global_batch_size == small.global_batch_size // 2


def test_heads_that_are_exchanged_for_tokens_divide_by_both_axes() -> None:
    run_file = run_file_of({"num_kv_heads": 4}, parallel={"cp": 4, "tp": 2, "context": "ulysses"})
    small = narrow(run_file, Sizes(cp=4, tp=2), [Sizes(cp=4, tp=2)]).run_file
    assert small.model.num_heads % 8 == 0
    assert check(on_layout(small, Sizes(cp=4, tp=2)), 8) == []


@pytest.mark.parametrize(
    ("heads", "kv_heads", "axes", "are_repeated"),
    [
        (6, 3, {"cp": 2}, True),
        (12, 6, {"cp": 2, "tp": 2}, True),
        (4, 2, {"cp": 2}, False),
        (8, 2, {"cp": 4}, True),
        (6, 2, {"cp": 3}, True),
    ],
)
def test_key_heads_that_an_exchange_repeats_are_repeated_in_the_narrow_run_too(
    heads: int, kv_heads: int, axes: dict[str, int], are_repeated: bool
) -> None:
    parallel = axes | {"context": "ulysses", "dp_shard": 1}
    model = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": 8, "hidden_size": 64, "ffn_hidden_size": 96}
    plan = plan_proof(run_file_of(model, parallel=parallel), prod(axes.values()))
    small = plan.narrowed.run_file.model
    assert small.num_heads % small.num_kv_heads == 0
    assert (small.num_kv_heads // axes.get("tp", 1) % axes["cp"] != 0) == are_repeated


def test_the_cover_of_a_cluster_fits_the_narrow_run() -> None:
    run_file = read_run_file(RUNS / "qwen3_30b_a3b.toml", ["parallel.tp=4", "parallel.etp=2"], world_size=128)
    target = sizes_of(run_file, 128)
    layouts = cover(target, has_experts=True).layouts
    small = narrow(run_file, target, layouts).run_file
    assert [check(on_layout(small, sizes), sizes.world) for sizes in layouts] == [[]] * len(layouts)


@pytest.mark.parametrize(
    ("keys", "turned"),
    [
        ({"rope_fraction": 0.125}, 4),
        ({"rope_fraction": 0.25}, 2),
        ({"rope_fraction": 0.25, "rope_scaling": {"kind": "ntk", "factor": 2.0}}, 4),
        ({"rope_scaling": {"kind": "ntk", "factor": 2.0}}, 8),
    ],
)
def test_what_is_turned_of_a_head_stays_pairs(keys: dict[str, object], turned: int) -> None:
    sizes = {"num_layers": 2, "hidden_size": 256, "num_heads": 4, "head_dim": 64, "vocab_size": 64}
    found = narrowed({**sizes, **keys}, Sizes())
    assert found.problems() == []
    assert int(found.head_dim * found.rope_fraction) == turned
