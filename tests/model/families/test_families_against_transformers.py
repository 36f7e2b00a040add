"""Names, shapes and configurations of each family, judged by the class itself in transformers."""

import json
from math import prod
from pathlib import Path

import pytest
from safetensors import safe_open
from tiny_exports import CONFIGS

from meshwright.model.config import ModelConfig
from meshwright.model.counts.shapes import parameter_shapes
from meshwright.model.families.choose import choose_family, config_from_foreign
from meshwright.model.families.family import BUFFERS, our_shapes

transformers = pytest.importorskip("transformers")

COMPUTED_WITH = (
    "layers",
    "norm",
    "norm_placement",
    "norm_eps",
    "embedding_norm",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "qk_norm",
    "qk_norm_over",
    "position",
    "max_positions",
    "rope_scaling",
    "attention_scale",
    "attention_gate",
    "ffn_activation",
    "bias",
    "tie_embeddings",
    "latent",
    "gated_delta",
)


@pytest.fixture(params=CONFIGS, scope="module")
def named_config(request: pytest.FixtureRequest) -> tuple[str, ModelConfig]:
    return request.param, CONFIGS[request.param]


def written_by_transformers(ours: ModelConfig, folder: Path) -> dict[str, tuple[int, ...]]:
    """Build the class from our config.json, at random, let it write itself, and return what it wrote."""
    family = choose_family(ours)
    (folder / "config.json").write_text(json.dumps({"model_type": family.model_type} | family.to_foreign(ours)))
    foreign = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    transformers.AutoModelForCausalLM.from_config(foreign).save_pretrained(folder / "written")
    with safe_open(folder / "written" / "model.safetensors", framework="np") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def test_names_and_shapes_are_those_that_transformers_writes_and_its_config_reads_as_ours(
    named_config: tuple[str, ModelConfig], tmp_path: Path
) -> None:
    name, ours = named_config
    family = choose_family(ours)
    assert family.model_type == name.split()[0]
    rows = list(family.mapping(ours))
    assert len({row.theirs for row in rows}) == len(rows)
    assert {row.theirs: row.shape for row in rows} == written_by_transformers(ours, tmp_path)
    foreign = json.loads((tmp_path / "written" / "config.json").read_text())
    read = config_from_foreign(foreign)
    assert list(family.mapping(read)) == rows
    for key in COMPUTED_WITH:
        assert getattr(read, key) == getattr(ours, key), key


def test_our_old_and_new_keys_each_read_back_alone(named_config: tuple[str, ModelConfig]) -> None:
    _, ours = named_config
    family = choose_family(ours)
    both = {"model_type": family.model_type} | family.to_foreign(ours)
    old = {key: value for key, value in both.items() if key != "rope_parameters"}
    new = {key: value for key, value in both.items() if key not in ("rope_theta", "rope_scaling")}
    for spelling in (old, new):
        read = config_from_foreign(spelling)
        assert (read.rope_base, read.rope_scaling) == (ours.rope_base, ours.rope_scaling)


def test_the_rows_fill_our_weights_exactly(named_config: tuple[str, ModelConfig]) -> None:
    _, ours = named_config
    rows = list(choose_family(ours).mapping(ours))
    filled = {name: shape for name, shape in our_shapes(rows).items() if not name.startswith(BUFFERS)}
    assert filled == parameter_shapes(ours)
    for row in rows:
        assert prod(row.shape) == sum(prod(source.shape) for source in row.sources), row


def test_a_gap_between_slices_is_found() -> None:
    ours = CONFIGS["mixtral"]
    rows = [row for row in choose_family(ours).mapping(ours) if row.sources[0].at != 2]
    with pytest.raises(ValueError, match=r"experts\.gate is filled twice or with gaps"):
        our_shapes(rows)
