"""Norms against torch's and transformers', their gradients, and where a block has them."""

from typing import Any

import pytest
import torch
from mixer_parity import documents, errors_on, too_far
from rank_pool import run_mesh
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from meshwright.model.block import Block, Multipliers
from meshwright.model.config import ModelConfig
from meshwright.model.kinds.norms import FORMS, Form, deepnorm_alpha, deepnorm_gain, norm_shapes
from meshwright.model.norms import NORMS, AdaptiveNorm, DynamicTanh, LayerNorm, ZeroCentredRMSNorm
from meshwright.model.parts import build_model, initialise
from meshwright.parallel.mesh import Mesh, Sizes
from meshwright.parallel.where import Where, where_of_plain_tokens

S, B, H = 3, 2, 5


def drawn(norm: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    norm = norm.double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_has_its_weights_and_its_gradients(name: str) -> None:
    norm = drawn(NORMS[name](H, 1e-5))
    assert {key: tuple(value.shape) for key, value in norm.named_parameters()} == dict(norm_shapes(name, H))
    x = torch.randn(S, B, H, dtype=torch.float64, requires_grad=True)
    names = [key for key, _ in norm.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Any:
        return torch.func.functional_call(norm, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *norm.parameters()))


def test_norms_are_those_of_torch_and_transformers() -> None:
    x = torch.randn(S, B, H)
    ours, theirs = LayerNorm(H, 1e-5), nn.LayerNorm(H, 1e-5)
    nn.init.normal_(theirs.weight), nn.init.normal_(theirs.bias)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    zero, gemma = ZeroCentredRMSNorm(H, 1e-6), GemmaRMSNorm(H, 1e-6)
    nn.init.normal_(gemma.weight)
    zero.load_state_dict(gemma.state_dict())
    torch.testing.assert_close(zero(x), gemma(x))
    tanh = DynamicTanh(H)
    initialise(tanh)
    torch.testing.assert_close(tanh(x), torch.tanh(0.5 * x))


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_begins_as_its_plain_self(name: str) -> None:
    norm, x = NORMS[name](H, 1e-6), torch.randn(S, B, H)
    initialise(norm)
    plain = {
        "rmsnorm": torch.nn.functional.rms_norm(x, (H,), eps=1e-6),
        "layernorm": torch.nn.functional.layer_norm(x, (H,), eps=1e-6),
        "dynamic_tanh": torch.tanh(x / 2),
    }
    plain |= {"rmsnorm_zero_centred": plain["rmsnorm"], "adaptive_rmsnorm": plain["rmsnorm"]}
    plain["adaptive_layernorm"] = plain["layernorm"]
    torch.testing.assert_close(norm(x), plain[name])


def test_a_condition_scales_and_shifts() -> None:
    norm = drawn(AdaptiveNorm(H, 1e-6, centred=True, condition_size=4))
    x, condition = torch.randn(S, B, H, dtype=torch.float64), torch.randn(B, 4, dtype=torch.float64)
    scale, shift = nn.functional.linear(condition, norm.condition.weight, norm.condition.bias).chunk(2, -1)
    expected = torch.nn.functional.layer_norm(x, (H,), eps=1e-6) * (1 + scale) + shift
    torch.testing.assert_close(norm(x, condition), expected)
    with pytest.raises(ValueError, match="condition_size"):
        norm(x)
    with pytest.raises(ValueError, match="condition_size"):
        drawn(AdaptiveNorm(H, 1e-6))(x, condition)


def conditioned_norm(centred: bool) -> AdaptiveNorm:
    norm = drawn(AdaptiveNorm(H, 1e-6, centred=centred, condition_size=4))
    assert isinstance(norm, AdaptiveNorm)
    return norm


@pytest.mark.parametrize("centred", [False, True])
def test_a_condition_has_its_gradients(centred: bool) -> None:
    norm = conditioned_norm(centred)
    x = torch.randn(S, B, H, dtype=torch.float64, requires_grad=True)
    condition = torch.randn(B, 4, dtype=torch.float64, requires_grad=True)
    names = [key for key, _ in norm.named_parameters()]
    assert names == ["condition.weight", "condition.bias"]

    def run(x: Tensor, condition: Tensor, *values: Tensor) -> Any:
        return torch.func.functional_call(norm, dict(zip(names, values, strict=True)), (x, condition))

    assert torch.autograd.gradcheck(run, (x, condition, *norm.parameters()))


class OneCondition(nn.Module):
    """A conditioned norm as a mixer is called, with a condition of each sample."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.norm = AdaptiveNorm(H, 1e-6, centred=True, condition_size=4, tp=mesh.tp)

    def forward(self, x: Tensor, where: Where, tally: None) -> Tensor:
        return self.norm(x, torch.linspace(-1.0, 1.0, B * 4, dtype=x.dtype).view(B, 4))


def conditioned_errors(mesh: Mesh) -> dict[str, float]:
    x = torch.randn(8, B, H, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return errors_on(mesh, OneCondition, x, documents(8), False, True)


@pytest.mark.parametrize("sizes", [Sizes(tp=2), Sizes(tp=2, cp=2)], ids=str)
def test_a_condition_s_weights_are_whole_and_their_gradients_sums_of_the_ranks(sizes: Sizes) -> None:
    assert too_far(run_mesh(sizes, conditioned_errors)) == {}


class Doubled(nn.Module):
    """A part that can be followed by hand."""

    def forward(self, x: Tensor, where: Where | None = None, tally: None = None) -> Tensor:
        return 2 * x + 1

    def step(self, x: Tensor, state: None) -> Tensor:
        return self.forward(x)


class Scaled(nn.Module):
    """A norm that can be told from another."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by


def f(x: Tensor) -> Tensor:
    return 2 * x + 1


BY_HAND = {
    ("pre", "mixer"): lambda x: x + f(3 * x),
    ("post", "mixer"): lambda x: 5 * (x + f(x)),
    ("sandwich", "feedforward"): lambda x: x + 5 * f(3 * x),
    ("branch", "mixer"): lambda x: x + 5 * f(x),
    ("deepnorm", "mixer"): lambda x: 5 * (x + f(x)),
    ("pre_post", "mixer"): lambda x: x + f(3 * x),
    ("pre_post", "feedforward"): lambda x: 5 * (x + f(x)),
    ("hybrid_norm", "mixer"): lambda x: x + f(x),
    ("hybrid_norm", "feedforward"): lambda x: 3 * x + f(3 * x),
}


@pytest.mark.parametrize(("placing", "place"), BY_HAND)
def test_a_block_has_its_norms_where_they_are_placed(placing: str, place: str) -> None:
    form = FORMS[placing][place]
    norms = {"norm": Scaled(3.0), "post_norm": Scaled(5.0)}
    block = Block(Doubled(), **{name: norms[name] for name in form.names}, form=form)
    x = torch.randn(S, B, H)
    where = where_of_plain_tokens(torch.zeros(S, B, dtype=torch.int64))
    assert torch.equal(block(x, where, None), BY_HAND[placing, place](x))
    assert torch.equal(block.step(x, None), BY_HAND[placing, place](x))


def test_a_block_multiplies_stream_and_branch() -> None:
    block = Block(Doubled(), form=Form(), multipliers=Multipliers(4.0, 0.5))
    x = torch.randn(S, B, H)
    assert torch.equal(block.step(x, None), 4.0 * x + 0.5 * f(x))


def test_a_block_without_the_norm_of_its_form_is_refused() -> None:
    with pytest.raises(ValueError, match="has the norms"):
        Block(Doubled(), form=FORMS["post"]["mixer"])


SIZES: dict[str, Any] = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "vocab_size": 32}


def test_deepnorm_scales_the_stream_and_shrinks_the_values() -> None:
    """Of a decoder of 8 layers alpha = 16^(1/4) = 2, beta = 64^(-1/4)."""
    assert deepnorm_alpha(8) == 2.0
    assert deepnorm_gain(8) == pytest.approx(64**-0.25)
    sizes = SIZES | {"num_layers": 8}
    plain = build_model(ModelConfig(**sizes, init_depth_scaled=False))
    deep = build_model(ModelConfig(**sizes, norm_placement="deepnorm"))
    assert deep.layers["0"].mixer.multipliers.stream == 2.0
    theirs = dict(plain.named_parameters())
    for name, value in deep.named_parameters():
        if name.endswith(("v.weight", "output.weight", "gate.weight", "up.weight", "down.weight")) and "layers" in name:
            torch.testing.assert_close(value, theirs[name] * 64**-0.25)
        elif "norm" not in name:
            assert torch.equal(value, theirs[name]), name


def test_deepnorm_begins_as_published() -> None:
    """Wang et al. 2022, figure 2: xavier_normal_ with gain beta = (8 * 8)^(-1/4); q and k with gain 1."""
    h, kv, f = 256, 128, 384
    sizes = {"num_layers": 8, "hidden_size": h, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": f}
    model = build_model(ModelConfig(**sizes, vocab_size=64, init="xavier_normal", norm_placement="deepnorm"))
    mixer, feedforward = model.layers["3"].mixer.part, model.layers["3"].feedforward.part
    beta = 64**-0.25
    published = [
        (mixer.q, h, h, 1.0), (mixer.k, h, kv, 1.0), (mixer.v, h, kv, beta), (mixer.output, h, h, beta),
        *((each, h, f, beta) for each in (feedforward.gate, feedforward.up, feedforward.down)),
    ]  # fmt: skip
    for each, fan_in, fan_out, gain in published:
        theirs = torch.nn.init.xavier_normal_(torch.empty(fan_out, fan_in), gain)
        assert each.weight.numel() == theirs.numel()
        # Of 32768 draws the standard deviation is known to 1 / sqrt(2 * 32768) = 0.4 %; five times that.
        assert each.weight.std().item() == pytest.approx(gain * (2 / (fan_in + fan_out)) ** 0.5, rel=0.02)
        assert each.weight.std().item() == pytest.approx(theirs.std().item(), rel=0.03)


def test_the_ends_scale_and_normalise() -> None:
    config = ModelConfig(**SIZES, embedding_multiplier=3.0, logits_scaling=8.0, embedding_norm=True, final_norm=False)
    model = build_model(config)
    tokens = torch.randint(0, 32, (S, B))
    x = torch.nn.functional.rms_norm(model.embedding(tokens) * 3.0, (16,), eps=1e-5)
    for layer in model.layers.values():
        x = layer(x, where_of_plain_tokens(tokens), None)
    torch.testing.assert_close(model(tokens), (x / 8.0) @ model.output.weight.T)


def test_layers_that_share_weights_are_used_again_and_have_states_of_their_own() -> None:
    config = ModelConfig(**(SIZES | {"num_layers": 6}), pattern="*-*", distinct_layers=2)
    model = build_model(config)
    apart = build_model(config.model_copy(update={"distinct_layers": 0}))
    assert set(model.layers) == {"0", "1"}
    mine = dict(model.named_parameters())
    for name, value in apart.named_parameters():
        number = name.split(".")[1] if name.startswith("layers.") else ""
        same = name.replace(f"layers.{number}.", f"layers.{int(number) % 2}.") if number else name
        value.data.copy_(mine[same])
    tokens, targets = torch.randint(0, 32, (2, 7, B))
    where = where_of_plain_tokens(tokens)
    model(tokens, targets, where).backward()
    apart(tokens, targets, where).backward()
    theirs = dict(apart.named_parameters())
    torch.testing.assert_close(model(tokens), apart(tokens))
    for number in (0, 1):
        for name, value in model.layers[str(number)].named_parameters():
            summed = sum(theirs[f"layers.{at}.{name}"].grad for at in range(number, 6, 2))
            torch.testing.assert_close(value.grad, summed)
    state = model.initial_state(B, 7)
    assert len(state.layers) == 6
    stepped = [model.step(tokens[at : at + 1], state) for at in range(7)]
    torch.testing.assert_close(torch.cat(stepped), model(tokens))
    assert state.length == 7


def test_layers_that_share_weights_draw_other_numbers_each_time() -> None:
    model = build_model(ModelConfig(**SIZES, distinct_layers=1, residual_dropout=0.5)).train()
    seen: list[Tensor] = []
    model.layers["0"].mixer.part.register_forward_hook(lambda *_: torch.ones(S, B, 16))
    model.layers["0"].mixer.register_forward_hook(lambda _, x, y: seen.append(y - x[0]))
    model(torch.randint(0, 32, (S, B)))
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"distinct_layers": 4}, "model.distinct_layers = 4: must divide model.num_layers = 6, and"),
        ({"distinct_layers": 3, "pattern": "*-*"}, "one of [2, 6] would fit"),
    ],
)
def test_layers_that_cannot_share_are_named(changes: dict[str, Any], line: str) -> None:
    config = ModelConfig(**(SIZES | {"num_layers": 6} | changes))
    assert len(config.problems()) == 1
    assert line in config.problems()[0]


@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
def test_rows_of_positions_are_added_to_the_embedding(position: str) -> None:
    more = {"max_positions": 9} if position == "learned" else {}
    model = build_model(ModelConfig(**SIZES, position=position, **more))
    tokens = torch.randint(0, 32, (7, B))
    alone = build_model(ModelConfig(**SIZES, position="none"))
    rows = model.begin(tokens, where_of_plain_tokens(tokens)) - model.embedding(tokens)
    if position == "learned":
        torch.testing.assert_close(rows, model.positions.weight[:7, None].expand(-1, B, -1))
    else:
        angle = torch.arange(7.0)[:, None] * 10_000.0 ** -(torch.arange(0, 16, 2) / 16)
        torch.testing.assert_close(rows[:, 0], torch.stack([angle.sin(), angle.cos()], -1).flatten(1))
    assert not torch.equal(model(tokens), alone(tokens))
    state = model.initial_state(B, 7)
    stepped = [model.step(tokens[:3], state), *(model.step(tokens[at : at + 1], state) for at in range(3, 7))]
    torch.testing.assert_close(torch.cat(stepped), model(tokens))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"position": "learned"}, "model.max_positions = 0: model.position"),
        ({"max_positions": 8}, "model.max_positions = 8: is for learned positions"),
        ({"position": "sinusoidal", "hidden_size": 15, "head_dim": 8}, "one of [14, 16] fits"),
    ],
)
def test_positions_that_cannot_be_are_named(changes: dict[str, Any], line: str) -> None:
    (found,) = ModelConfig(**(SIZES | changes)).problems()
    assert line in found
