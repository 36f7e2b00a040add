"""What may differ between the model at init.from and the one that begins from its weights."""

from typing import Any

import pytest

from meshwright.launcher.runfile.source_rules import differing_keys, source_problems, training_line
from meshwright.launcher.runfile.tables import InitConfig
from meshwright.model.config import ModelConfig

SIZES: dict[str, Any] = {"num_layers": 2, "hidden_size": 24, "num_heads": 4, "head_dim": 8, "ffn_hidden_size": 32}
EXPERTS = {"pattern": "*E", "moe": {"num_experts": 4, "top_k": 2, "expert_hidden_size": 32}}
DENSE = ModelConfig(**SIZES)
COPY, POOL = InitConfig(upcycle="copy"), InitConfig(pool_kv_heads=True)


def model(**changes: Any) -> ModelConfig:
    return ModelConfig(**(SIZES | changes))


def told(here: ModelConfig, there: ModelConfig = DENSE) -> list[str]:
    return [str(change) for change in differing_keys(there, here)]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"rope_base": 100.0}, "rope_base: 10000.0 -> 100.0"),
        ({"ffn_activation": "geglu"}, 'ffn_activation: "swiglu" -> "geglu"'),
        ({"norm_eps": 1e-6}, "norm_eps: 1e-05 -> 1e-06"),
        ({"pattern": "-*"}, 'pattern: "*-" -> "-*"'),
        ({"attention_scale": 0.25}, "attention_scale: 0.0 -> 0.25"),
        ({"distinct_layers": 1}, "distinct_layers: 0 -> 1"),
        ({"num_layers": 3}, "num_layers: 2 -> 3"),
    ],
)
def test_a_key_by_which_the_same_weights_compute_something_else_is_told(changes: dict[str, Any], line: str) -> None:
    assert told(model(**changes)) == [line]


@pytest.mark.parametrize(
    "changes",
    [
        {"init_std": 0.1, "init": "scaled", "residual_dropout": 0.1, "attention_dropout": 0.2},
        {"pattern": "2(*-)"},  # the same layers
        {"distinct_layers": 2},
        {"num_kv_heads": 4, "vocab_size": 320, "attention_scale": 8**-0.5},  # what is filled in
    ],
)
def test_keys_that_leave_the_result_alone_are_not_told(changes: dict[str, Any]) -> None:
    assert told(model(**changes)) == []


def test_sizes_that_follow_from_another_one_and_keys_that_nothing_reads_are_not_told_again() -> None:
    without = {key: value for key, value in SIZES.items() if key not in ("head_dim", "ffn_hidden_size")}
    assert told(ModelConfig(**without | {"num_heads": 2}), ModelConfig(**without)) == ["num_heads: 4 -> 2"]
    states = {"num_layers": 2, "hidden_size": 24, "pattern": "M"}
    assert told(ModelConfig(**states), ModelConfig(**states, ffn_hidden_size=96)) == []
    assert told(ModelConfig(**states), ModelConfig(**states, mamba2={"state_size": 16})) == [
        "mamba2.state_size: 16 -> 128"
    ]


def test_a_table_that_one_of_them_has_is_told_and_what_would_fit() -> None:
    stretched = {"rope_scaling": {"kind": "linear", "factor": 2.0}}
    (added,) = source_problems(DENSE, model(**EXPERTS, **stretched), COPY, same_shapes=True)
    assert added.startswith("[model.rope_scaling]: is there, and must be as at init.from")
    assert added.endswith("leaving it out would fit")
    (left_out,) = source_problems(model(**stretched), model(**EXPERTS), COPY, same_shapes=True)
    assert left_out.startswith("[model.rope_scaling]: is left out, and")
    assert 'kind = "linear", factor = 2.0' in left_out


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"ffn_activation": "geglu"}, [('model.ffn_activation = "geglu": must be as at', '; "swiglu" would fit')]),
        (
            {"num_heads": 8, "head_dim": 4},
            [("model.num_heads = 8: must be as at", "; 4 would fit"), ("model.head_dim = 4: must", "; 8 would fit")],
        ),
        ({"hidden_size": 20}, [("model.hidden_size = 20: must be as at init.from", "; 24 would fit")]),
        ({"num_kv_heads": 2}, [("model.num_kv_heads = 2: must be as at init.from", "; 4 would fit")]),
        ({"pattern": "[*E]"}, [('model.pattern = "[*E]": must be that at init.from, "*-", with', '; "*E" would fit')]),
        ({"multi_token": {}}, [("[model.multi_token]: is there, and must be", "leaving it out would fit")]),
        ({"pattern": "*-*E"}, []),  # layers that stay dense
        ({"attention_dropout": 0.1, "init_std": 0.5}, []),
    ],
)
def test_an_upcycled_model_computes_what_the_dense_one_does(
    changes: dict[str, Any], lines: list[tuple[str, str]]
) -> None:
    found = source_problems(DENSE, model(**(EXPERTS | changes)), COPY, same_shapes=True)
    assert len(found) == len(lines)
    for line, (begin, end) in zip(found, lines, strict=True):
        assert line.startswith(begin)
        assert line.endswith(end)


def test_routers_of_layers_in_brackets_are_not_made() -> None:
    (line,) = source_problems(DENSE, model(**EXPERTS | {"pattern": "[*E]"}), COPY, same_shapes=False)
    assert "and its layers are not in [ ], whose routers would have to be trained there" in line
    (line,) = source_problems(model(pattern="[*-]"), model(**EXPERTS), COPY, same_shapes=False)
    assert "whose routers" not in line
    assert line.endswith('"[*E]" would fit')


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, ""),
        ({"capacity_factor": 1.25}, "model.moe.capacity_factor = 1.25: "),
        ({"capacity_factor": 2.0}, ""),  # each of the 4 experts may have all tokens, which have two each
        ({"expert_dropout": 0.1, "router_jitter": 0.3}, "model.moe.expert_dropout = 0.1: "),
    ],
)
def test_what_parts_the_first_loss_in_training_from_the_dense_models_is_told(
    changes: dict[str, Any], told: str
) -> None:
    moe = {"num_experts": 4, "top_k": 2, "expert_hidden_size": 64} | changes
    found = training_line(model(pattern="*E", moe=moe))
    assert [line.startswith(told) for line in found] == [True] * bool(told)
    dropouts = training_line(model(pattern="*E", moe=moe, residual_dropout=0.2))
    assert dropouts[0].startswith(f"model.residual_dropout = 0.2{', ' + told if told else ': '}")


def test_experts_are_not_made_of_experts() -> None:
    (line,) = source_problems(model(**EXPERTS), model(**EXPERTS), COPY, same_shapes=False)
    assert line.startswith('init.upcycle = "copy": makes experts of dense layers')
    assert line.endswith('"none" would fit')


@pytest.mark.parametrize("pattern", ["m", "*"])
def test_experts_are_not_made_of_layers_without_feed_forwards(pattern: str) -> None:
    (line,) = source_problems(model(pattern=pattern), model(**EXPERTS), COPY, same_shapes=False)
    assert line.startswith(
        'init.upcycle = "copy": makes experts of dense layers, and the model at init.from has no feed-'
    )
    assert line.endswith(f'(model.pattern = "{pattern}"); "none" would fit')


@pytest.mark.parametrize(
    ("how", "width", "way_out"),
    [
        ("copy", 32, "40 would fit, and with it model.moe.expert_hidden_size = 40"),
        ("copy", 40, "40 would fit"),
        ("partition", 16, "40 would fit, and with it a model.moe.expert_hidden_size that divides it"),
        ("partition", 8, "40 would fit"),
    ],
)
def test_the_width_of_the_dense_model_is_told_with_that_of_its_experts(how: str, width: int, way_out: str) -> None:
    experts = EXPERTS | {"moe": {"num_experts": 4, "top_k": 2, "expert_hidden_size": width}}
    init = InitConfig.model_validate({"upcycle": how})
    (line,) = source_problems(model(ffn_hidden_size=40), model(**experts, ffn_hidden_size=32), init, same_shapes=False)
    assert line.startswith("model.ffn_hidden_size = 32: must be as at init.from")
    assert line.endswith(f"; {way_out}")


def test_heads_are_pooled_that_were_trained() -> None:
    here = model(num_heads=2, num_kv_heads=1, head_dim=16, rope_base=100.0)
    heads, width = source_problems(DENSE, here, POOL, same_shapes=True)
    assert heads == "model.num_heads = 2: must be as at init.from, or its weights compute something else; 4 would fit"
    assert width.startswith("model.head_dim = 16: must be as at init.from")
    assert source_problems(DENSE, model(num_kv_heads=2), POOL, same_shapes=True) == []


def test_heads_are_not_pooled_to_more_of_them() -> None:
    (line,) = source_problems(model(num_kv_heads=2), DENSE, POOL, same_shapes=False)
    assert line.startswith("model.num_kv_heads = 4: must divide the 2 key heads at init.from")
    assert line.endswith("one of [1, 2] would fit")


def test_pooling_from_another_width_names_the_key_where_the_shapes_say_so() -> None:
    here = model(hidden_size=20, num_kv_heads=2, rope_base=100.0)
    (line,) = source_problems(DENSE, here, POOL, same_shapes=False)
    assert line.startswith("model.hidden_size = 20: must be as at init.from")
    assert source_problems(DENSE, here, POOL, same_shapes=True) == []
