"""From a config to a model: names and shapes of every parameter, types, and what is refused."""

import jaxtyping
import pytest
import torch

from meshwright.model.config import ModelConfig
from meshwright.model.feedforward.mlp import Mlp
from meshwright.model.feedforward.moe import Moe, RouterLosses
from meshwright.model.kinds.feedforward.moe import MoeConfig
from meshwright.model.kinds.table import KINDS
from meshwright.model.mixers.attention import Attention, Heads, Products, rms_norms
from meshwright.model.norms import RMSNorm
from meshwright.model.parts import MAKERS, build_model, initialise
from meshwright.model.positions import Rope
from meshwright.model.presets import preset
from meshwright.parallel.initialise import InitPolicy

H, N, K, D, F, V, E, X = 12, 4, 2, 6, 10, 33, 3, 5
SIZES = {"num_heads": N, "num_kv_heads": K, "head_dim": D, "ffn_hidden_size": F, "hidden_size": H, "vocab_size": V}
MOE = MoeConfig(num_experts=E, top_k=1, expert_hidden_size=X, num_shared_experts=2)

ATTENTION = {"q.weight": (N * D, H), "k.weight": (K * D, H), "v.weight": (K * D, H), "output.weight": (H, N * D)}
EVERY_BIAS = {"q.bias": (N * D,), "k.bias": (K * D,), "v.bias": (K * D,), "output.bias": (H,)}
QK_NORM = {"q_norm.weight": (D,), "k_norm.weight": (D,)}
MLP = {"gate.weight": (F, H), "up.weight": (F, H), "down.weight": (H, F)}
MLP_BIAS = {"gate.bias": (F,), "up.bias": (F,), "down.bias": (H,)}
SHARED = {"shared.gate.weight": (2 * X, H), "shared.up.weight": (2 * X, H), "shared.down.weight": (H, 2 * X)}
EXPERTS = {"experts.gate": (E, X, H), "experts.up": (E, X, H), "experts.down": (E, H, X), "router.weight": (E, H)}
EXPERT_BIAS = {"experts.gate_bias": (E, X), "experts.up_bias": (E, X), "experts.down_bias": (E, H)}
SHARED_BIAS = {"shared.gate.bias": (2 * X,), "shared.up.bias": (2 * X,), "shared.down.bias": (H,)}


def under(prefix: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.part.{name}": shape for name, shape in shapes.items()} | {f"{prefix}.norm.weight": (H,)}


ENDS = {"embedding.weight": (V, H), "final_norm.weight": (H,)}


@pytest.mark.parametrize(
    ("changes", "layers", "has_output"),
    [
        ({}, [(ATTENTION, MLP)] * 2, True),
        (
            {"bias": ("q", "k", "v", "output", "ffn"), "qk_norm": True, "tie_embeddings": True},
            [(ATTENTION | EVERY_BIAS | QK_NORM, MLP | MLP_BIAS)] * 2,
            False,
        ),
        ({"pattern": "*-*E", "moe": MOE}, [(ATTENTION, MLP), (ATTENTION, EXPERTS | SHARED)], True),
        (
            {"pattern": "*E", "moe": MOE, "bias": ("ffn",)},
            [(ATTENTION, EXPERTS | SHARED | EXPERT_BIAS | SHARED_BIAS)] * 2,
            True,
        ),
        ({"pattern": "*", "ffn_hidden_size": 0}, [(ATTENTION, None)] * 2, True),
    ],
)
def test_a_model_has_the_parameters_of_the_documents(
    changes: dict[str, object], layers: list[tuple[dict[str, tuple[int, ...]], ...]], has_output: bool
) -> None:
    config = ModelConfig(**SIZES | {"num_layers": 2} | changes)
    expected = ENDS | ({"output.weight": (V, H)} if has_output else {})
    for number, (mixer, feedforward) in enumerate(layers):
        expected |= under(f"layers.{number}.mixer", mixer)
        expected |= under(f"layers.{number}.feedforward", feedforward) if feedforward else {}
    assert {name: tuple(p.shape) for name, p in build_model(config).named_parameters()} == expected


def test_a_config_is_spent_on_its_parts() -> None:
    config = ModelConfig(**SIZES, num_layers=2, pattern="*-*E", moe=MOE, qk_norm=True, norm_eps=0.25, rope_base=77.0)
    model = build_model(config)
    attention, moe = model.layers["0"].mixer.part, model.layers["1"].feedforward.part
    assert isinstance(attention, Attention)
    assert attention.core.look.position == Rope(77.0)
    assert {module.eps for module in model.modules() if isinstance(module, RMSNorm)} == {0.25}
    assert isinstance(moe, Moe)
    assert moe.losses == RouterLosses("sequence", 0.01, 0.001)
    assert (moe.router.top_k, moe.router.normalise, moe.name) == (1, True, "layers.1")
    assert isinstance(model.layers["0"].feedforward.part, Mlp)
    assert set(MAKERS) == set(KINDS)


def test_weights_have_the_type_and_the_seed_that_are_asked_for() -> None:
    config = ModelConfig(**SIZES, num_layers=1, pattern="*E", moe=MOE.model_copy(update={"load_balancing": "step"}))
    narrow, wide, other = build_model(config, dtype=torch.bfloat16), build_model(config), build_model(config, seed=1)
    for name, value in wide.named_parameters():
        assert value.dtype == torch.float32
        assert torch.equal(dict(narrow.named_parameters())[name], value.bfloat16()), name
        changed = not torch.equal(dict(other.named_parameters())[name], value)
        assert changed == (not name.endswith("norm.weight")), name
    assert narrow.layers["0"].feedforward.part.previous_share.dtype == torch.float32  # counts are not rounded


def test_a_part_by_itself_begins_as_its_policy_says() -> None:
    part = Attention(
        64,
        Heads(4, 2, 16),
        norms=rms_norms(1e-6),
        products=Products(frozenset({"q"})),
        init=InitPolicy("normal", std=0.5),
    )
    initialise(part, seed=3)
    assert part.v.weight.std().item() == pytest.approx(0.5, rel=0.1)
    assert part.q_norm.weight.unique().tolist() == [1.0]
    assert part.q.bias.unique().tolist() == [0.0]
    again = Attention(64, Heads(4, 2, 16), init=InitPolicy("normal", std=0.5))
    initialise(again, seed=3)
    assert torch.equal(again.v.weight, part.v.weight)


def test_a_model_on_meta_holds_nothing() -> None:
    model = build_model(ModelConfig(**SIZES, num_layers=1), device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_config_that_makes_no_model_is_refused_with_every_reason() -> None:
    config = ModelConfig(**(SIZES | {"num_kv_heads": 3, "vocab_size": 0}), num_layers=2, pattern="*E")
    with pytest.raises(ValueError) as error:
        build_model(config)
    text = str(error.value)
    assert "model.num_kv_heads = 3" in text
    assert "[model.moe]" in text
    line = "model.vocab_size = 0: must be the number of tokens of the tokenizer; vocab_size=32768 would fit"
    assert line in text.splitlines()


@pytest.mark.parametrize(("given", "name"), [("moe-tiny", "moe-tiny"), ("mo-tinny", "moe-tiny"), ("", "dense-tiny")])
def test_a_name_is_no_config_and_the_line_says_what_makes_one(
    given: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which outside of tests checks nothing
    with pytest.raises(ValueError, match="must be a ModelConfig") as error:
        build_model(given)  # type: ignore[arg-type]
    way_out = f'build_model(preset("{name}", vocab_size=32768))'
    assert str(error.value) == f'config = "{given}": must be a ModelConfig; {way_out} would fit'
    assert build_model(preset(name, vocab_size=32768), device="meta").embedding is not None


def test_every_block_draws_its_dropout_by_a_name_of_its_own() -> None:
    model = build_model(preset("moe-tiny", vocab_size=64), device="meta")
    names = [block.name for layer in model.layers.values() for block in layer.blocks]
    assert names == ["layers.0.mixer", "layers.0.feedforward", "layers.1.mixer", "layers.1.feedforward"]
