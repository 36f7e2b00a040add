"""The schema, the list of keys and the example run files keep up with the tables."""

import json
import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from meshwright.launcher.runfile.keys import all_keys, field_of
from meshwright.launcher.runfile.models_page import with_tables
from meshwright.launcher.runfile.read import examine, load_toml, read_run_file
from meshwright.launcher.runfile.schema import json_schema, key_list, with_key_list
from meshwright.model.kinds.feedforward.mlp import FfnActivation
from meshwright.model.kinds.feedforward.moe import RouterKind
from meshwright.model.kinds.mixers.attention_keys import PositionName, RopeScalingConfig
from meshwright.model.kinds.norms import NormName, Placing
from meshwright.model.kinds.table import KINDS
from meshwright.model.presets import PRESETS, preset

ROOT = Path(__file__).resolve().parents[3]
RUNS = ROOT / "runs"
PAGE = ROOT / "docs" / "run-file.md"
PARTS = sorted((RUNS / "parts").glob("*.toml"))
# Every name that these keys can have; a new one needs a run file, or for an activation a preset at least.
CHOICES = {"norm": NormName, "norm_placement": Placing, "position": PositionName, "ffn_activation": FfnActivation}
OF_PRESETS = {key: [preset(name) for name in PRESETS] if key == "ffn_activation" else [] for key in CHOICES}
ANEW = "run `python -m meshwright.launcher.runfile.schema`"

# The ranks that each file is to be sound on, on which scaling experiments are made; a new file must be named here.
WORLD_SIZES = {
    "moe_tiny": (2, 4, 8, 16, 32),
    "dense_tiny": (1, 2, 4, 8),
    "dense_small": (1, 2, 4, 8, 16, 32),
    "mamba_tiny": (1, 2, 4, 8, 16, 32),
    "hybrid_tiny": (2, 4, 8, 16, 32),
    "llama3_8b": (32, 64),
    "qwen3_30b_a3b": (32, 64, 128, 256),
}


def test_the_schema_is_current() -> None:
    assert (RUNS / "schema.json").read_text(encoding="utf-8") == json_schema(), ANEW


def test_the_list_of_keys_is_current() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_key_list(page), ANEW


def test_the_page_of_models_is_current_and_has_every_choice() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert page == with_tables(page), ANEW
    choices = (NormName, Placing, PositionName, RouterKind, FfnActivation)
    for value in (value for choice in choices for value in get_args(choice)):
        assert f'`"{value}"`' in page, value


def test_a_page_without_its_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="the page has no part between"):
        with_key_list("nothing here")


@pytest.mark.parametrize("key", all_keys())
def test_every_key_says_what_it_is(key: str) -> None:
    field = field_of(key)
    assert field is not None
    assert field.description is not None
    assert len(field.description) > 15
    assert f"| `{key.rpartition('.')[2]}` |" in key_list()


def test_every_key_is_in_the_schema_with_its_meaning() -> None:
    schema = json.loads(json_schema())
    described = json.dumps(schema, ensure_ascii=False)
    assert schema["additionalProperties"] is False
    for definition in schema["$defs"].values():
        assert definition["additionalProperties"] is False
        for name, value in definition["properties"].items():
            assert "description" in value or "$ref" in json.dumps(value), name
    assert "from" in schema["$defs"]["InitConfig"]["properties"]
    assert "Weight of the load-balancing loss" in described


def test_the_schema_is_of_the_version_whose_words_it_uses() -> None:
    schema = json.loads(json_schema())
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert "prefixItems" in schema["$defs"]["OptimizerConfig"]["properties"]["betas"]


def test_the_schema_asks_for_the_keys_without_a_default_unless_a_preset_has_them() -> None:
    definitions = json.loads(json_schema())["$defs"]
    with_preset, without = definitions["ModelConfig"]["anyOf"]
    assert with_preset == {"required": ["preset"]}
    assert without["required"] == ["num_layers", "hidden_size"]
    assert without["properties"]["moe"]["required"] == ["num_experts", "top_k", "expert_hidden_size"]
    assert definitions["TrainConfig"]["required"] == ["steps", "global_batch_size"]


@pytest.mark.parametrize("name", WORLD_SIZES)
def test_a_run_file_has_the_keys_that_the_schema_asks_for(name: str) -> None:
    schema, tables = json.loads(json_schema()), load_toml(RUNS / f"{name}.toml")
    _, without = schema["$defs"]["ModelConfig"]["anyOf"]
    assert set(schema["required"]) <= set(tables)
    assert set(tables) <= set(schema["properties"])
    model = tables["model"]
    if "preset" not in model:
        assert set(without["required"]) <= set(model)
        if "E" in model["pattern"]:
            assert set(without["properties"]["moe"]["required"]) <= set(model["moe"])


def test_every_run_file_is_known_here() -> None:
    assert {path.stem for path in RUNS.glob("*.toml")} == set(WORLD_SIZES)


@pytest.mark.parametrize(("name", "ranks"), [(name, ranks) for name, all_ in WORLD_SIZES.items() for ranks in all_])
def test_a_run_file_is_sound_on_its_ranks(name: str, ranks: int) -> None:
    path = RUNS / f"{name}.toml"
    run_file = read_run_file(path, world_size=ranks)
    assert run_file.run.name == name.replace("_", "-")
    assert path.read_text(encoding="utf-8").startswith("#:schema schema.json\n")


@pytest.mark.parametrize("path", PARTS, ids=lambda path: path.stem)
def test_a_run_file_of_a_part_is_sound_on_the_ranks_that_it_names(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#:schema ../schema.json\n")
    assert f"meshwright train runs/parts/{path.name} --ranks 2\n" in text
    run_file = read_run_file(path, world_size=2)
    assert run_file.run.name == path.stem.replace("_", "-")
    assert run_file.evaluation.every * 2 <= run_file.train.steps


def test_every_kind_of_part_and_every_name_of_a_choice_is_in_some_run_file() -> None:
    models = [read_run_file(path).model for path in (*PARTS, *RUNS.glob("*.toml"))]
    assert set(KINDS) - {kind.name for model in models for kind in model.part_kinds} == set()
    for key, names in CHOICES.items():
        assert set(get_args(names)) - {getattr(model, key) for model in models + OF_PRESETS[key]} == set(), key
    assert set(get_args(RouterKind)) - {model.moe.router for model in models if model.moe} == set()
    stretching = get_args(RopeScalingConfig.model_fields["kind"].annotation)
    assert set(stretching) - {model.rope_scaling.kind for model in models if model.rope_scaling} == set()


def test_the_main_jobs_file_explains_each_of_its_keys() -> None:
    keys = [line for line in (RUNS / "moe_tiny.toml").read_text().splitlines() if re.match(r"\w+ *=", line)]
    assert len(keys) > 30
    assert [line for line in keys if "#" not in line] == []


def test_the_page_shows_a_run_file_that_is_sound_and_the_messages_that_there_are() -> None:
    page = PAGE.read_text(encoding="utf-8")
    example = page.partition("```toml\n")[2].partition("```")[0]
    assert examine(tomllib.loads(example), world_size=1)[1] == []
    shown = page.partition("nothing was started\n")[2].partition("\n```")[0].splitlines()
    overrides = ["train.stps=100", "parallel.ep=12"]
    _, problems = examine(load_toml(RUNS / "qwen3_30b_a3b.toml"), overrides, world_size=48)
    assert [line.strip() for line in shown] == problems
