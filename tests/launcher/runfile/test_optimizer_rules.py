"""Which optimizer takes a parameter, and what of a run file's [optimizer] cannot be done to the model."""

import pytest

from meshwright.launcher.runfile.optimizer_rules import changed_kinds, settings_of
from meshwright.launcher.runfile.read import examine
from meshwright.launcher.runfile.tables import OptimizerConfig, RunFile
from meshwright.model.config import ModelConfig
from meshwright.model.counts.shapes import parameter_shapes


def examined(*overrides: str) -> tuple[RunFile | None, list[str]]:
    tables = {
        "run": {"name": "x"},
        "model": {"preset": "moe-tiny", "vocab_size": 320, "bias": ["q", "ffn"], "num_layers": 2, "qk_norm": True},
        "data": {"store": "s", "seq_len": 64},
        "train": {"steps": 100, "global_batch_size": 24},
        "learning_rate": {"peak": 1e-3},
    }
    return examine(tables, overrides)


def kinds(*overrides: str) -> dict[str, str]:
    run_file, problems = examined(*overrides)
    assert run_file is not None, problems
    shapes = parameter_shapes(run_file.model)
    return {name: settings_of(name, shape, run_file.optimizer).kind for name, shape in shapes.items()}


def test_muon_takes_the_matrices_of_the_layers_and_nothing_else() -> None:
    found = kinds("optimizer.kind=muon")
    of_layer = {name.removeprefix("layers.1.") for name, kind in found.items() if kind == "muon" and ".1." in name}
    products = {f"mixer.part.{place}.weight" for place in ("q", "k", "v", "output")}
    stacks = {f"feedforward.part.experts.{place}" for place in ("gate", "up", "down")}
    shared = {f"feedforward.part.shared.{place}.weight" for place in ("gate", "up", "down")}
    assert of_layer - shared == products | stacks
    assert {name for name, kind in found.items() if kind == "muon" and not name.startswith("layers.")} == set()
    assert set(kinds().values()) == {"adamw"}


def test_what_governs_a_state_is_not_decayed_and_its_products_go_to_muon() -> None:
    model = ModelConfig(pattern="MmGS-", num_layers=4, hidden_size=96, vocab_size=320)
    config = OptimizerConfig.model_validate({"kind": "muon", "weight_decay": 0.1})
    found = {name: settings_of(name, shape, config) for name, shape in parameter_shapes(model).items()}
    parts = {name.partition(".part.")[2]: settings for name, settings in found.items() if ".mixer.part." in name}
    undecayed = {name for name, settings in parts.items() if settings.weight_decay == 0.0}
    convolutions = {f"conv_{each}.weight" for each in ("x", "B", "C", "q", "k", "v")}
    biases = {f"conv_{each}.bias" for each in ("x", "B", "C")} | {"output.bias", "gate.bias"}
    of_state = {"A_log", "A_imag", "C", "D", "log_dt", "dt_bias", "norm.weight"}
    assert undecayed == of_state | convolutions | biases
    by_muon = {name.removesuffix(".weight") for name, settings in parts.items() if settings.kind == "muon"}
    assert by_muon == {"z", "x", "B", "C", "output", "gate", "q", "k", "v"}


LATENT = {"kv_lora_rank": 10, "q_lora_rank": 14, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8}
# Matrices that stay with AdamW, of each part in one layer, as docs/optimizer.md says.
OF_ADAMW = {
    "*-": ({}, set()),
    "L-": ({"sliding": {"window": 4}}, set()),
    "+-": ({"latent": LATENT}, set()),
    "H-": ({"switch_head": {"num_experts": 4}}, {"mixer.part.source", "mixer.part.destination"}),
    "M": ({}, {"mixer.part.dt.weight", *(f"mixer.part.conv_{each}.weight" for each in "xBC")}),
    "m": ({}, {f"mixer.part.{each}" for each in ("dt_down.weight", "dt_up.weight", "A_log", "conv_x.weight")}),
    "G": ({}, {f"mixer.part.{each}.weight" for each in ("a", "beta", "conv_q", "conv_k", "conv_v")}),
    "S": ({}, {f"mixer.part.{each}" for each in ("log_dt", "A_log", "A_imag", "C", "D")}),
    "[*-]": ({}, {"router.weight", "predictor.weight", "predictor.inward"}),
    "*E": (
        {"moe": {
            "num_experts": 4, "top_k": 2, "expert_hidden_size": 8, "num_shared_experts": 1, "shared_expert_gate": True
        }},
        {"feedforward.part.router.weight", "feedforward.part.shared_gate.weight"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("pattern", OF_ADAMW)
def test_muon_takes_all_matrices_of_a_part_but_those_that_the_page_names(pattern: str) -> None:
    keys, expected = OF_ADAMW[pattern]
    heads = {"num_heads": 4} if set(pattern) & set("*L+H") else {}
    further = {} if "[" in pattern else {"multi_token": {}}
    model = ModelConfig(pattern=pattern, num_layers=1, hidden_size=32, vocab_size=64, **heads, **keys, **further)
    assert model.problems() == []
    config, shapes = OptimizerConfig(kind="muon"), parameter_shapes(model)
    left = {
        name for name, shape in shapes.items()
        if len(shape) > 1 and settings_of(name, shape, config).kind == "adamw" and not name.endswith("bias")
    }  # fmt: skip
    beginnings = ("layers.0.", "multi_token.0.layer.") if further else ("layers.0.",)
    matrices = {f"{begin}{name}" for begin in beginnings for name in expected if len(shapes[f"{begin}{name}"]) > 1}
    assert left - {"embedding.weight", "output.weight"} == matrices
    if further:
        projection = "multi_token.0.projection.weight"
        assert settings_of(projection, shapes[projection], config).kind == "muon"


def test_learned_positions_decay_as_embeddings_do_and_t5s_table_as_biases_do() -> None:
    sizes = {"num_layers": 1, "hidden_size": 32, "num_heads": 4, "vocab_size": 64}
    learned = parameter_shapes(ModelConfig(**sizes, position="learned", max_positions=16))
    t5 = parameter_shapes(ModelConfig(**sizes, position="t5"))
    table = next(name for name in t5 if name.endswith("table"))
    for decays in (True, False):
        config = OptimizerConfig(embedding_weight_decay=decays, weight_decay=0.1)
        expected = 0.1 if decays else 0.0
        for name in ("positions.weight", "embedding.weight", "output.weight"):
            assert settings_of(name, learned[name], config).weight_decay == expected
        assert settings_of(table, t5[table], config).weight_decay == 0.0
        assert settings_of("layers.0.mixer.part.q.weight", (32, 32), config).weight_decay == 0.1


def test_a_group_chooses_the_kind_both_ways() -> None:
    one = (
        'optimizer.groups=[{match = "layers.0.*.q.weight", kind = "adamw"}, {match = "*.router.weight", kind = "muon"}]'
    )
    usual, found = kinds("optimizer.kind=muon"), kinds("optimizer.kind=muon", one)
    assert {name for name in found if found[name] != usual[name]} == {
        "layers.0.mixer.part.q.weight",
        "layers.0.feedforward.part.router.weight",
        "layers.1.feedforward.part.router.weight",
    }
    only = kinds('optimizer.groups=[{match = "*.q.weight", kind = "muon"}]', "optimizer.muon_steps=7")
    assert {name for name, kind in only.items() if kind == "muon"} == {
        f"layers.{n}.mixer.part.q.weight" for n in (0, 1)
    }


def test_the_factor_is_for_adamw_and_a_group_has_its_own() -> None:
    config = OptimizerConfig.model_validate(
        {
            "kind": "muon",
            "adamw_learning_rate_factor": 3.0,
            "groups": [{"match": "output.*", "learning_rate_factor": 0.5}],
        }
    )
    factors = {name: settings_of(name, (6, 4), config).learning_rate_factor for name in ("output.weight", "x.weight")}
    assert factors == {"output.weight": 0.5, "x.weight": 3.0}
    assert settings_of("layers.0.mixer.part.q.weight", (6, 4), config).learning_rate_factor == 1.0


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ['optimizer.groups=[{match = "layers.0.mixer.*", kind = "muon"}]'],
            'optimizer.groups[0].kind = "muon": is for matrices, and no matrix is layers.0.mixer.norm.weight,'
            " layers.0.mixer.part.q.bias, layers.0.mixer.part.q_norm.weight and 1 more; a narrower match would fit",
        ),
        (
            ['optimizer.groups=[{match = "*experts.up*", kind = "muon"}]'],
            'optimizer.groups[0].kind = "muon": is for matrices, and no matrix is'
            " layers.0.feedforward.part.experts.up_bias, layers.1.feedforward.part.experts.up_bias; a narrower match"
            " would fit",
        ),
        (
            ["optimizer.kind=muon", 'optimizer.groups=[{match = "*.q.weight", betas = [0.5, 0.6]}]'],
            "optimizer.groups[0].betas = [0.5, 0.6]: is AdamW's, and all that falls into this group"
            " (layers.0.mixer.part.q.weight, layers.1.mixer.part.q.weight) is updated by Muon; leave it out, or"
            ' kind = "adamw" in this group',
        ),
        (
            ["optimizer.muon_momentum=0.9"],
            'optimizer.muon_momentum = 0.9: has no effect with optimizer.kind = "adamw"; leave it out, or'
            ' optimizer.kind = "muon"',
        ),
        (
            ["optimizer.adamw_learning_rate_factor=2.0"],
            'optimizer.adamw_learning_rate_factor = 2.0: has no effect with optimizer.kind = "adamw"; leave it out, or'
            ' optimizer.kind = "muon"',
        ),
        (["optimizer.muon_momentum=1.0", "optimizer.kind=muon"], "optimizer.muon_momentum = 1.0: must be below 1.0"),
        (["optimizer.kind=mun"], 'optimizer.kind = "mun": must be one of ["adamw", "muon"]; did you mean "muon"?'),
    ],
)
def test_what_cannot_be_done_is_told_before_a_rank_is_started(overrides: list[str], expected: str) -> None:
    _run_file, problems = examined(*overrides)
    assert problems == [expected]


def test_what_changes_hands_is_known_by_name() -> None:
    shapes = {"layers.0.mixer.part.q.weight": (4, 4), "output.weight": (4, 4), "final_norm.weight": (4,)}
    adamw, muon = OptimizerConfig(), OptimizerConfig(kind="muon")
    assert changed_kinds(shapes, adamw, muon) == {"layers.0.mixer.part.q.weight": "muon"}
    assert changed_kinds(shapes, muon, adamw) == {"layers.0.mixer.part.q.weight": "adamw"}
    assert changed_kinds(shapes, muon, muon) == {}
