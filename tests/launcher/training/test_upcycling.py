"""A mixture of experts that begins from a dense model: the same loss without noise, in every layout."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import run_mesh
from tiny_run import EP2, numbers, start, start_on, write_run_file
from torch import Tensor

from meshwright.launcher.runfile.messages import ConfigError
from meshwright.launcher.runfile.read import examine
from meshwright.launcher.runfile.tables import InitConfig
from meshwright.launcher.weights.upcycle import Upcycled
from meshwright.model.config import ModelConfig
from meshwright.model.counts.shapes import parameter_shapes
from meshwright.model.parts import build_model
from meshwright.model.presets import preset

EXPERTS = ("[model.moe]", "num_experts = 4", "top_k = 2", "num_shared_experts = 1", 'load_balancing = "step"')
FROZEN = ("learning_rate.peak=1e-12", "train.steps=1", "evaluation.every=1")
COPY = ("init.upcycle=copy", "model.moe.num_shared_experts=0", "model.moe.expert_hidden_size=64")
PARTITION = ("init.upcycle=partition", *COPY[1:2], "model.moe.expert_hidden_size=16", "model.moe.num_experts=8")
ALL_PIECES = (*PARTITION, "model.moe.top_k=4")
# Four pieces in groups of two: of equal groups the lower come first, so that those of one feed-forward are kept.
PIECES_IN_GROUPS = (*ALL_PIECES, "model.moe.num_groups=4", "model.moe.top_groups=2")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a dense run; return its folder."""
    folder = tmp_path_factory.mktemp("dense")
    path = write_run_file(folder)
    lines = path.read_text().replace('"*E"', '"*-"').splitlines()
    path.write_text("\n".join(line for line in lines if line not in EXPERTS and "expert_hidden" not in line))
    start(folder)
    return folder


def first_loss(folder: Path, dense: Path, *overrides: str) -> float:
    start(folder, f'init.from="{dense / "run"}"', *FROZEN, *overrides)
    return numbers(folder, "validation_loss", "evaluation")[0]


@pytest.mark.parametrize("how", [COPY, ALL_PIECES, PIECES_IN_GROUPS, (*COPY, "model.moe.weight_scale=2.5")], ids=str)
def test_the_first_loss_is_the_dense_models(dense: Path, tmp_path: Path, how: tuple[str, ...]) -> None:
    loss = numbers(dense, "validation_loss", "evaluation")[-1]
    assert first_loss(tmp_path, dense, *how) == pytest.approx(loss, rel=1e-5)  # experts' products round otherwise


def test_noise_makes_experts_differ(dense: Path, tmp_path: Path) -> None:
    loss = numbers(dense, "validation_loss", "evaluation")[-1]
    found = first_loss(tmp_path, dense, *COPY, "init.upcycle_noise=0.5")
    assert found != pytest.approx(loss, rel=1e-5)
    assert found == pytest.approx(loss, rel=0.5)


@pytest.mark.slow
def test_a_single_checkpoint_is_taken_on_two_ranks(dense: Path, tmp_path: Path) -> None:
    loss = numbers(dense, "validation_loss", "evaluation")[-1]
    source = sorted((dense / "run" / "checkpoints").iterdir())[-1]
    overrides = [f"run.folder={tmp_path / 'run'}", f'init.from="{source}"', "parallel.ep=2", *FROZEN, *ALL_PIECES]
    run_mesh(EP2, start_on, tmp_path, overrides)
    assert numbers(tmp_path, "validation_loss", "evaluation")[0] == pytest.approx(loss, rel=1e-5)


def test_a_dense_model_of_another_width_is_refused_with_every_difference(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        first_loss(tmp_path, dense, *COPY[:2], "model.moe.expert_hidden_size=128", "model.ffn_hidden_size=128")
    assert "layers.0.feedforward.part.gate.weight is [64, 16]" in str(refused.value)
    assert "layers.1.feedforward.part.down.weight is [16, 64]" in str(refused.value)


class Held:
    """Weights in memory."""

    path = Path("memory")

    def __init__(self, config: ModelConfig) -> None:
        self.held = {name: value.detach() for name, value in build_model(config).named_parameters()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self.held.items()}

    def buffers(self) -> dict[str, tuple[int, ...]]:
        return {}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        return self.held[name][slice(*rows) if rows else slice(None)]


SIZES: dict[str, Any] = {"num_layers": 1, "hidden_size": 12, "num_heads": 4, "head_dim": 4}
SIZES |= {"ffn_hidden_size": 6, "vocab_size": 16}


def test_key_heads_are_the_means_of_their_groups() -> None:
    source = Held(ModelConfig(**SIZES, bias=("k",)))
    source.held["layers.0.mixer.part.k.bias"] = torch.arange(16.0)
    wanted = ModelConfig(**SIZES, num_kv_heads=2, bias=("k",))
    pooled = Upcycled(source, wanted, InitConfig(pool_kv_heads=True), 0, lambda _: torch.empty(0))
    k = source.held["layers.0.mixer.part.k.weight"]
    expected = torch.cat([(k[:4] + k[4:8]) / 2, (k[8:12] + k[12:]) / 2])
    torch.testing.assert_close(pooled.read("layers.0.mixer.part.k.weight"), expected)
    torch.testing.assert_close(pooled.read("layers.0.mixer.part.k.bias"), torch.tensor([2.0, 3, 4, 5, 10, 11, 12, 13]))
    assert pooled.read("layers.0.mixer.part.v.weight", (2, 5)).shape == (3, 12)


def test_pieces_and_their_routers_are_in_groups() -> None:
    source = Held(ModelConfig(**SIZES))
    moe = {"num_experts": 6, "top_k": 3, "expert_hidden_size": 2}
    wanted = ModelConfig(**SIZES, pattern="*E", moe=moe)
    fresh = torch.randn(6, 12)
    made = Upcycled(source, wanted, InitConfig(upcycle="partition"), 0, lambda _: fresh)
    part = "layers.0.feedforward.part"
    gate, down = source.held[f"{part}.gate.weight"], source.held[f"{part}.down.weight"]
    assert torch.equal(made.read(f"{part}.experts.gate", (4, 5))[0], gate[2:4])
    assert torch.equal(made.read(f"{part}.experts.down", (2, 3))[0], down[:, 4:] * 3)
    assert torch.equal(made.read(f"{part}.router.weight"), fresh[[0, 0, 0, 3, 3, 3]])


IN_GROUPS = (
    "init.from=x",
    "init.upcycle=partition",
    "model.moe.router=sigmoid",
    "model.moe.num_experts=12",
    "model.moe.top_k=3",
    "model.moe.expert_hidden_size=2",
)
"""Three pieces of each feed-forward."""


def test_the_example_of_the_page_is_sound_and_made_of_the_model_that_it_names() -> None:
    page = (Path(__file__).parents[3] / "docs" / "export.md").read_text(encoding="utf-8")
    tables = tomllib.loads(page.partition("```toml\n")[2].partition("```")[0])
    tables |= {"run": {"name": "x"}, "data": {"store": "x", "seq_len": 8}, "learning_rate": {"peak": 1.0}}
    run_file, found = examine(tables | {"train": {"steps": 1, "global_batch_size": 1}})
    assert run_file is not None, found
    wanted, source = run_file.model.with_vocab(64), Held(preset("dense-tiny", vocab_size=64, num_kv_heads=4))
    made = Upcycled(source, wanted, run_file.init, 0, lambda name: torch.empty(parameter_shapes(wanted)[name]))
    for name, shape in parameter_shapes(wanted).items():
        assert made.read(name).shape == shape


def problems(*overrides: str, sizes: dict[str, Any] = SIZES) -> list[str]:
    model = {**sizes, "pattern": "*E", "moe": {"num_experts": 4, "top_k": 2, "expert_hidden_size": 6}}
    tables: dict[str, Any] = {"run": {"name": "x"}, "model": model, "data": {"store": "x", "seq_len": 8}}
    tables |= {"train": {"steps": 1, "global_batch_size": 1}, "learning_rate": {"peak": 1.0}}
    return examine(tables, overrides)[1]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("init.upcycle=copy",), "init.from"),
        (("init.from=x", "init.upcycle_noise=0.5"), "init.upcycle_noise = 0.5: is for experts"),
        (("init.from=x", "init.upcycle=copy", "init.load=weights+optimizer"), "init.load"),
        (("init.from=x", "init.upcycle=copy", "model.moe.normalise_top_k=false"), "must have weights that sum to 1"),
        (("init.from=x", "init.upcycle=copy", "model.moe.num_shared_experts=1"), "model.moe.num_shared_experts = 1"),
        (("init.from=x", "init.upcycle=copy", "model.moe.expert_hidden_size=3"), "6 would fit"),
        (("init.from=x", "init.upcycle=partition", "model.moe.expert_hidden_size=4"), "3 would fit"),
        (("init.from=x", "init.upcycle=partition", "model.moe.expert_hidden_size=2"), "model.moe.num_experts = 4"),
        (("init.from=x", "init.upcycle=partition", "model.moe.router=noisy"), "pieces of several feed-forwards"),
        ((*IN_GROUPS, "model.moe.num_groups=6", "model.moe.top_groups=2"), "groups of 2 experts, which part the 3"),
        ((*IN_GROUPS, "model.moe.num_groups=6", "model.moe.top_groups=2"), "4 would fit"),
        ((*IN_GROUPS, "model.moe.num_groups=6", "model.moe.top_groups=5"), "1 with model.moe.top_groups = 1 would fit"),
    ],
)
def test_what_cannot_be_upcycled_is_named(overrides: tuple[str, ...], line: str) -> None:
    assert any(line in found for found in problems(*overrides)), problems(*overrides)
    assert not problems("init.from=x", "init.upcycle=copy")


@pytest.mark.parametrize(
    ("how", "way_out"),
    [
        (
            "copy",
            "copies experts are; 6 would fit, as model.moe.expert_hidden_size is 6 (both must be the dense model's)",
        ),
        ("partition", "pieces experts are; model.moe.expert_hidden_size = 6 must divide it"),
    ],
)
@pytest.mark.parametrize("written", [{}, {"ffn_hidden_size": 0}])
def test_a_width_that_is_not_written_is_named_as_missing(how: str, way_out: str, written: dict[str, int]) -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "ffn_hidden_size"} | written  # 64 would be filled in
    told = problems("init.from=x", f"init.upcycle={how}", sizes=sizes)
    line = "model.ffn_hidden_size: is missing, and must be that of the dense model at init.from, whose "
    assert told == [line + way_out]
    assert problems("init.from=x", f"init.upcycle={how}", "model.ffn_hidden_size=6", sizes=sizes) == []


@pytest.mark.parametrize(("groups", "top"), [(4, 2), (12, 3), (6, 6)])
def test_groups_that_keep_the_pieces_together_are_taken(groups: int, top: int) -> None:
    overrides = (*IN_GROUPS, f"model.moe.num_groups={groups}", f"model.moe.top_groups={top}")
    assert not [line for line in problems(*overrides) if "which part" in line]


def test_heads_are_pooled_where_experts_and_routed_layers_are_already() -> None:
    moe = {"num_experts": 4, "top_k": 2, "expert_hidden_size": 6}
    source = Held(ModelConfig(**(SIZES | {"num_layers": 2}), pattern="*E[*E]", moe=moe))
    wanted = ModelConfig(**(SIZES | {"num_layers": 2}), pattern="*E[*E]", moe=moe, num_kv_heads=2)
    pooled = Upcycled(source, wanted, InitConfig(pool_kv_heads=True), 0, lambda _: torch.empty(0))
    for part in ("0.feedforward.part.experts.gate", "1.router.weight", "1.feedforward.part.router.weight"):
        name = f"layers.{part}"
        assert torch.equal(pooled.read(name), source.held[name])


def test_routed_layers_keep_their_routers_when_experts_are_made() -> None:
    source = Held(ModelConfig(**SIZES, pattern="[*-]"))
    moe = {"num_experts": 4, "top_k": 2, "expert_hidden_size": 6}
    made = Upcycled(source, ModelConfig(**SIZES, pattern="[*E]", moe=moe), InitConfig(upcycle="copy"), 0, torch.empty)
    assert torch.equal(made.read("layers.0.router.weight"), source.held["layers.0.router.weight"])
