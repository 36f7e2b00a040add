"""Names, shapes and configurations of each family, judged by the class itself in transformers."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from meshwright.model.config import ModelConfig, MoeConfig
from meshwright.model.families.choose import choose_family, config_from_foreign
from meshwright.model.families.family import inverse, our_shapes

transformers = pytest.importorskip("transformers")

MOE = MoeConfig(num_experts=5, top_k=2, expert_hidden_size=20)
# Every size is another one, and head_dim is not hidden_size / num_heads, so that no swap passes unseen.
SIZES = {"num_layers": 2, "hidden_size": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "vocab_size": 70}
ALL_ATTENTION = ("q", "k", "v", "output")


def config(**changes: object) -> ModelConfig:
    return ModelConfig(**(SIZES | {"ffn_hidden_size": 24} | changes))  # type: ignore[arg-type]


CONFIGS = {
    "llama": config(),
    "llama tied with biases": config(tie_embeddings=True, bias=(*ALL_ATTENTION, "ffn"), rope_base=5e5, norm_eps=1e-6),
    "qwen3": config(qk_norm=True),
    "qwen3 tied with biases": config(qk_norm=True, tie_embeddings=True, bias=ALL_ATTENTION),
    "mixtral": config(pattern="*E", moe=MOE),
    "mixtral tied": config(pattern="*E", moe=MOE, tie_embeddings=True, rope_base=1e6),
    "qwen3_moe": config(pattern="*E", moe=MOE, qk_norm=True),
    "qwen3_moe un-normalised, mixed, with biases": config(
        pattern="*-*E", moe=MOE.model_copy(update={"normalise_top_k": False}), qk_norm=True, bias=ALL_ATTENTION
    ),
}


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


def test_names_and_shapes_are_those_that_transformers_writes(
    named_config: tuple[str, ModelConfig], tmp_path: Path
) -> None:
    name, ours = named_config
    family = choose_family(ours)
    assert family.model_type == name.split()[0]
    assert {row.theirs: row.shape for row in family.mapping(ours)} == written_by_transformers(ours, tmp_path)


def test_a_config_written_by_transformers_reads_as_ours(named_config: tuple[str, ModelConfig], tmp_path: Path) -> None:
    _, ours = named_config
    written_by_transformers(ours, tmp_path)
    foreign = json.loads((tmp_path / "written" / "config.json").read_text())
    read = config_from_foreign(foreign)
    told_apart = {"ffn_hidden_size"} if choose_family(ours).model_type == "mixtral" else set()
    shown = read.model_dump(exclude=told_apart)
    assert shown == ours.model_dump(exclude=told_apart)
    assert choose_family(read).mapping(read) == choose_family(ours).mapping(ours)


def test_our_old_and_new_keys_each_read_back_alone(named_config: tuple[str, ModelConfig]) -> None:
    _, ours = named_config
    family = choose_family(ours)
    both = {"model_type": family.model_type} | family.to_foreign(ours)
    old = {key: value for key, value in both.items() if key not in ("rope_parameters",)}
    new = {key: value for key, value in both.items() if key not in ("rope_theta",)}
    for spelling in (old, new):
        assert config_from_foreign(spelling).rope_base == ours.rope_base


def test_the_mapping_has_an_inverse(named_config: tuple[str, ModelConfig]) -> None:
    _, ours = named_config
    rows = choose_family(ours).mapping(ours)
    back = inverse(rows)
    assert len(back) == len(rows) == len(set(back.values()))
    assert all(back[row.theirs] == (row.ours, row.at) for row in rows)


def test_stacked_experts_have_the_shape_of_all_their_slices() -> None:
    ours = CONFIGS["mixtral"]
    shapes = our_shapes(choose_family(ours).mapping(ours))
    assert shapes["layers.1.feedforward.part.experts.gate"] == (5, 20, 16)
    assert shapes["layers.1.feedforward.part.experts.down"] == (5, 16, 20)
    assert shapes["layers.1.feedforward.part.router.weight"] == (5, 16)
    assert shapes["layers.0.mixer.part.q.weight"] == (24, 16)


def test_a_gap_between_slices_is_found() -> None:
    ours = CONFIGS["mixtral"]
    rows = [row for row in choose_family(ours).mapping(ours) if row.at != 3]
    with pytest.raises(ValueError, match=r"experts\.gate is filled twice or with gaps"):
        our_shapes(rows)
