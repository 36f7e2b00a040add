"""A key that nothing reads beside the others is refused if the user wrote it, and left out if a preset did."""

import tomllib
from typing import Any

import pytest

from meshwright.launcher.runfile.read import examine
from meshwright.launcher.runfile.write import write_resolved
from meshwright.model.config import ModelConfig
from meshwright.model.kinds.table import ALL
from meshwright.model.kinds.unread import READ_WITH, idle_keys
from meshwright.model.presets import PRESETS, preset, with_preset

SIZES: dict[str, Any] = {"num_layers": 4, "hidden_size": 96, "num_heads": 6}
NO_HEADS = {key: size for key, size in SIZES.items() if key != "num_heads"}
LATENT = {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
MOE: dict[str, Any] = {"num_experts": 8, "top_k": 2, "expert_hidden_size": 32}


def problems(**changes: Any) -> list[str]:
    sizes = SIZES if "*" in changes.get("pattern", "*-") or "+" in changes["pattern"] else NO_HEADS
    return ModelConfig.model_validate({**sizes, **changes}).problems()


def experts(**keys: Any) -> dict[str, Any]:
    return {"pattern": "*E", "moe": {**MOE, **keys}}


def scaling(kind: str, **keys: Any) -> dict[str, Any]:
    return {"rope_scaling": {"kind": kind, "factor": 4.0, **keys}}


LATENT_YARN: dict[str, Any] = {"pattern": "+-", "latent": LATENT}
DYNAMIC: dict[str, Any] = {"norm": "dynamic_tanh", "norm_eps": 1e-6}
IDLE: list[tuple[dict[str, Any], str]] = [
    (
        {"init": "scaled", "init_std": 0.006},
        'model.init_std = 0.006: is for model.init = "normal", and it is "scaled"; 0.02 would fit',
    ),
    (
        {"init": "xavier_uniform", "init_std": 0.1},
        'model.init_std = 0.1: is for model.init = "normal", and it is "xavier_uniform"; 0.02 would fit',
    ),
    (
        {"norm_placement": "deepnorm", "init_depth_scaled": False},
        'model.init_depth_scaled = false: model.norm_placement = "deepnorm" begins with a scale of its own, whatever'
        " stands here; leave it out",
    ),
    (
        {**DYNAMIC},
        'model.norm_eps = 1e-06: model.norm = "dynamic_tanh" divides by nothing, and no part of model.pattern = "*-"'
        " has a norm of its own; leave it out",
    ),
    ({**DYNAMIC, "pattern": "m-"}, 'model.norm_eps = 1e-06: model.norm = "dynamic_tanh" divides by nothing'),
    (
        experts(bias_rate=0.01),
        'model.moe.bias_rate = 0.01: is for model.moe.router = "sigmoid" or "expert_choice", and it is "softmax";'
        " 0.001 would fit",
    ),
    (experts(router="sinkhorn", bias_rate=0.01), "model.moe.bias_rate = 0.01: is for model.moe.router ="),
    (
        experts(load_balancing="none", load_balancing_weight=0.1),
        'model.moe.load_balancing_weight = 0.1: is for model.moe.load_balancing = "sequence" or "step", and it is'
        ' "none"; 0.01 would fit',
    ),
    (experts(router="sigmoid", load_balancing_weight=0.1), "model.moe.load_balancing_weight = 0.1: is for"),
    (
        {"norm_placement": "hybrid_norm", "qk_norm": True},
        'model.qk_norm = true: model.norm_placement = "hybrid_norm" normalises q, k and v already; false would fit',
    ),
    (
        scaling("linear", beta_fast=16.0),
        'model.rope_scaling.beta_fast = 16.0: is for model.rope_scaling.kind = "yarn", and it is "linear"; 32.0 would'
        " fit",
    ),
    (
        scaling("ntk", original_length=64),
        'model.rope_scaling.original_length = 64: is for model.rope_scaling.kind = "yarn" or "llama3", and it is "ntk";'
        " 0 would fit",
    ),
    (scaling("ntk", mscale=1.0), 'model.rope_scaling.mscale = 1.0: is for model.rope_scaling.kind = "yarn"'),
    (scaling("linear", attention_factor=1.0), "model.rope_scaling.attention_factor = 1.0: is for"),
    (scaling("yarn", original_length=64, low_freq_factor=2.0), "model.rope_scaling.low_freq_factor = 2.0: is for"),
    (scaling("llama3", original_length=64, mscale_all_dim=1.0), "model.rope_scaling.mscale_all_dim = 1.0: is for"),
    (
        scaling("yarn", original_length=64, mscale=0.7),
        "model.rope_scaling.mscale = 0.7: does nothing without model.rope_scaling.mscale_all_dim, which is 0.0; 0.0"
        " would fit",
    ),
    (scaling("yarn", original_length=64, mscale_all_dim=0.7), "model.rope_scaling.mscale_all_dim = 0.7: does nothing"),
    ({**LATENT_YARN, **scaling("yarn", original_length=64, mscale=0.7)}, "model.rope_scaling.mscale = 0.7: does noth"),
    (
        {**LATENT_YARN, **scaling("yarn", original_length=64, mscale=0.7, mscale_all_dim=1.0, attention_factor=1.3)},
        "model.rope_scaling.mscale = 0.7: model.rope_scaling.attention_factor = 1.3 stands in its place; 0.0 would fit",
    ),
    (
        {"pattern": "m", "ffn_hidden_size": 77},
        'model.ffn_hidden_size = 77: nothing in model.pattern = "m" reads it; MLP (-) does; 0 would fit',
    ),
]


@pytest.mark.parametrize(("changes", "begins"), IDLE)
def test_a_key_that_another_one_leaves_idle_is_refused(changes: dict[str, Any], begins: str) -> None:
    (line,) = problems(**changes)
    assert line.startswith(begins)


@pytest.mark.parametrize(
    "changes",
    [
        {"init": "normal", "init_std": 0.006},
        {"init": "scaled", "init_std": 0.02},  # its default
        {"init": "scaled", "init_depth_scaled": False},
        {"norm_placement": "post", "init_depth_scaled": False},
        {**DYNAMIC, "qk_norm": True},
        {**DYNAMIC, "norm_placement": "hybrid_norm"},
        {**DYNAMIC, "pattern": "L-", "num_heads": 6, "qk_norm": True},
        {**DYNAMIC, "pattern": "M-"},
        {**DYNAMIC, "pattern": "G-"},
        {**DYNAMIC, "pattern": "+-", "latent": LATENT},
        {**DYNAMIC, "pattern": "*-M-"},
        experts(router="sigmoid", bias_rate=0.01),
        experts(router="expert_choice", bias_rate=0.01),
        experts(bias_rate=0.0),  # says that no bias moves
        experts(load_balancing="none", load_balancing_weight=0.0),  # says twice that there is no loss
        experts(load_balancing="step", load_balancing_weight=0.1),
        experts(router="sigmoid", load_balancing="sequence", load_balancing_weight=0.0001),
        scaling("yarn", original_length=64, beta_fast=16.0, attention_factor=1.0),
        scaling("yarn", original_length=64, mscale=1.0, mscale_all_dim=0.7),
        {**LATENT_YARN, **scaling("yarn", original_length=64, mscale_all_dim=0.7)},
        {**LATENT_YARN, **scaling("yarn", original_length=64, mscale_all_dim=0.7, attention_factor=1.3)},
        {"pattern": "m", "ffn_hidden_size": 256},  # what is filled in
        {**experts(), "ffn_hidden_size": 77},  # of the dense model that experts may be made of
        scaling("llama3", original_length=64, low_freq_factor=2.0),
    ],
)
def test_a_key_that_is_read_or_says_nothing_new_is_taken(changes: dict[str, Any]) -> None:
    assert problems(**changes) == []


def test_the_keys_that_hang_on_others_are_there() -> None:
    """A name that no table has would never be refused."""
    config = ModelConfig.model_validate({**SIZES, **experts(), **scaling("linear")})
    for key, hangs in READ_WITH.items():
        for name in (key, hangs.on):
            table, _, inner = name.rpartition(".")
            assert hasattr(getattr(config, table) if table else config, inner), name


def test_a_preset_whose_pattern_is_changed_loses_the_sizes_that_nothing_reads() -> None:
    config = preset("dense-small", pattern="M-")
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (0, 0, 0)
    assert (config.hidden_size, config.num_layers, config.tie_embeddings) == (768, 12, True)


WRITTEN: list[tuple[dict[str, Any], str]] = [
    ({"num_heads": 12}, "model.num_heads = 12: nothing in"),
    ({"qk_norm": True}, "model.qk_norm = true: nothing in"),
    ({"pattern": "M", "ffn_hidden_size": 64}, "model.ffn_hidden_size = 64: nothing in"),
    ({"bias": ["q", "ffn"]}, 'model.bias has "q": nothing in'),
    ({"rope_scaling": {"kind": "linear", "factor": 2.0}}, "model.rope_scaling: nothing in"),
    ({"moe": MOE}, 'model.pattern = "M-": has no E'),
]


@pytest.mark.parametrize(("written", "begins"), WRITTEN)
def test_what_the_user_wrote_himself_is_refused_all_the_same(written: dict[str, Any], begins: str) -> None:
    with pytest.raises(ValueError, match=r"reads it|uses the table") as refused:
        preset("dense-small", **{"pattern": "M-", **written})
    (line,) = str(refused.value).split("\n")
    assert line.startswith(begins)


PATTERNS = [kind.example for kind in ALL] + ["M", "m", "-", "*", "M-*-"]
NEEDED = {"L": "sliding", "B": "block_sparse", "+": "latent", "H": "switch_head", "E": "moe"}
TABLES: dict[str, Any] = {"sliding": {}, "block_sparse": {}, "latent": LATENT, "switch_head": {}, "moe": MOE}


@pytest.mark.parametrize("name", PRESETS)
def test_no_preset_leaves_anything_idle_with_any_pattern(name: str) -> None:
    for pattern in PATTERNS:
        letters = [letter for letter in NEEDED if letter in pattern and NEEDED[letter] not in PRESETS[name]]
        tables = {NEEDED[letter]: TABLES[NEEDED[letter]] for letter in letters}
        heads = {"num_heads": 4} if "num_heads" not in PRESETS[name] and set(pattern) & set("*LB+H") else {}
        keys = with_preset({"preset": name, "pattern": pattern, **tables, **heads})
        config = ModelConfig.model_validate(keys)
        assert idle_keys(config) == [], pattern
        assert not [line for line in config.problems() if "uses the table" in line], pattern


@pytest.mark.parametrize(
    ("name", "changes", "left_out"),
    [
        ("gpt2", {"position": "rope"}, "max_positions"),
        ("llama3-1b", {"position": "alibi"}, "rope_scaling"),
        ("deepseek-v3", {"init": "scaled"}, "init_std"),
        ("olmo2-1b", {"qk_norm": False}, "qk_norm_over"),
        ("qwen3-8b", {"norm_placement": "hybrid_norm"}, "qk_norm"),
        ("qwen3-8b", {"norm": "dynamic_tanh", "qk_norm": False}, "norm_eps"),
        ("gpt2", {"pattern": "*"}, "bias"),
        ("dense-1b", {"pattern": "*"}, "ffn_hidden_size"),
        ("deepseek-v3", {"pattern": "*-", "rope_scaling": {"attention_factor": 1.3}}, "rope_scaling"),
        ("moe-small", {"pattern": "*-"}, "moe"),
    ],
)
def test_a_presets_key_that_another_change_leaves_idle_is_left_out(
    name: str, changes: dict[str, Any], left_out: str
) -> None:
    config = preset(name, **changes)
    assert getattr(config, left_out) != getattr(preset(name), left_out)


def test_a_presets_key_within_a_table_is_left_out_alone() -> None:
    config = preset("deepseek-v3", rope_scaling={"kind": "linear"}, moe={"load_balancing": "none"})
    assert config.rope_scaling is not None
    assert config.moe is not None
    assert (config.rope_scaling.factor, config.rope_scaling.mscale, config.rope_scaling.original_length) == (40.0, 0, 0)
    assert (config.moe.load_balancing_weight, config.moe.weight_scale) == (0.01, 2.5)
    with pytest.raises(ValueError, match=r"model\.rope_scaling\.mscale = 2\.0: is for"):
        preset("deepseek-v3", rope_scaling={"kind": "linear", "mscale": 2.0})


RUN = {
    "run": {"name": "x"},
    "data": {"store": "none", "seq_len": 64},
    "train": {"steps": 9, "global_batch_size": 1},
    "learning_rate": {"peak": 1e-3},
}


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        ({"pattern": "M-"}, []),
        ({"pattern": "M-", "num_layers": "x"}, ["model.num_layers"]),
        ({"pattern": "M-", "hidden_size": 0, "num_heads": 3}, ["model.hidden_size", "model.num_heads"]),
        ({"pattern": 5}, ["model.pattern"]),
        ({"pattern": "M-", "moe": 3}, ["model.moe"]),
        ({"pattern": "M-", "no_such": 3}, ["model.no_such:"]),
    ],
)
def test_a_run_file_is_told_of_its_own_mistakes_alone(model: dict[str, Any], keys: list[str]) -> None:
    _, found = examine({**RUN, "model": {"preset": "dense-small", **model}})
    assert [line.split(" ")[0] for line in found] == keys, found


@pytest.mark.parametrize(("name", "pattern"), [("moe-small", "*-"), ("llama3-1b", "M-"), ("deepseek-v3", "*-")])
def test_the_file_that_a_run_of_a_changed_preset_keeps_reads_back_equal(name: str, pattern: str) -> None:
    """It names the preset still, and has none of the tables that were left out."""
    run_file, problems = examine({**RUN, "model": {"preset": name, "pattern": pattern}})
    assert problems == []
    assert run_file is not None
    again, problems = examine(tomllib.loads(write_resolved(run_file)))
    assert problems == []
    assert again == run_file


def test_a_width_of_dense_feed_forwards_beside_experts_alone_may_stay_from_upcycling() -> None:
    # The run goes on without [init], and its checkpoints are of a model with that width.
    keys = {**SIZES, "pattern": "*E", "ffn_hidden_size": 64, "vocab_size": 64, "moe": MOE}
    for init in ({}, {"from": "x", "upcycle": "partition"}):
        assert examine({**RUN, "model": keys, "init": init})[1] == []


def test_a_width_that_follows_from_a_wrong_size_is_not_told_beside_it() -> None:
    keys = {**SIZES, "pattern": "m", "hidden_size": "abc", "ffn_hidden_size": 0, "vocab_size": 64}
    (line,) = examine({**RUN, "model": {key: keys[key] for key in keys if "head" not in key}})[1]
    assert line.startswith('model.hidden_size = "abc"')
