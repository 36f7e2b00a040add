"""Every part in a whole model: decoding is the full pass, documents do not leak, names, shapes and gradients agree."""

import copy
import pickle
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from engine_cases import VOCAB
from part_samples import OF_ACTIVATIONS, OF_KINDS, OF_NORMS, OF_POSITIONS, OF_ROUTERS, SAMPLES
from torch import Tensor

from meshwright.model.block import Layer
from meshwright.model.config import ModelConfig
from meshwright.model.counts.shapes import parameter_shapes, weights
from meshwright.model.kinds.mixers.attention_keys import PositionName
from meshwright.model.kinds.norms import NormName, Placing
from meshwright.model.kinds.table import KINDS
from meshwright.model.parts import MAKERS, build_model
from meshwright.model.pattern import parse_pattern
from meshwright.model.routers.table import ROUTERS
from meshwright.model.stack import LanguageModel
from meshwright.parallel.mesh import NO_TP
from meshwright.parallel.where import Where, place, where_of_plain_tokens

PAGE = Path(__file__).parents[2] / "docs" / "parts.md"
S, B = 12, 2
F64 = torch.float64
STRETCHES = {"one by one": [1] * S, "a prompt, then one by one": [7] + [1] * (S - 7)}
# By default each kind once, and what is decided anew in decoding; the rest are these parts once more.
DEFAULT = {*OF_KINDS, "depth by sigmoid", "router expert_choice"}
NAMES = [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in SAMPLES]
# In training these choose among the tokens of a whole sample; which they are in evaluation each token says by itself.
COMPETING = ("depth", "router expert_choice", "router sinkhorn", "router switch", "router with capacity")


def built(config: ModelConfig, dtype: torch.dtype = F64) -> LanguageModel:
    """Return the model with weights so large that every path matters, and no norm or bias at 1 or 0."""
    model = build_model(config, dtype=dtype, seed=3)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=F64))
    return model


def one_layer(config: ModelConfig, **changes: object) -> ModelConfig:
    """Return as few layers of it as there are of its own."""
    period = config.distinct_layers or len(parse_pattern(config.pattern))
    layers = 1 if period == 1 and not config.distinct_layers else config.num_layers
    return config.model_copy(update={"num_layers": layers, **changes})


def tokens_of(seed: int = 0, s: int = S) -> Tensor:
    return torch.randint(0, VOCAB, (s, B), generator=torch.Generator().manual_seed(seed))


def test_the_samples_are_of_everything_that_a_config_can_ask_for() -> None:
    assert OF_KINDS.keys() == KINDS.keys() == MAKERS.keys()
    for name, config in OF_KINDS.items():
        assert config.has(name)
    configs = SAMPLES.values()
    assert {config.norm for config in configs} == set(NormName.__args__)
    assert {config.norm_placement for config in configs} == set(Placing.__args__)
    assert {config.position for config in configs} == set(PositionName.__args__)
    assert {config.moe.router for config in OF_ROUTERS.values() if config.moe} == set(ROUTERS)
    around = {name for config in configs for layer in config.layers if layer.is_routed for name in layer.names}
    assert around == KINDS.keys(), "Mixture-of-Depths around every kind"
    assert len(OF_NORMS) + len(OF_POSITIONS) + len(OF_ACTIVATIONS) > 20


@pytest.mark.parametrize("name", SAMPLES)
def test_names_shapes_and_order_are_those_of_the_model(name: str) -> None:
    config = SAMPLES[name]
    found = {each: tuple(weight.shape) for each, weight in build_model(config, device="meta").named_parameters()}
    assert list(parameter_shapes(config).items()) == list(found.items())
    of_experts = [each for each, weight in weights(config).items() if weight.is_of_experts]
    assert of_experts == [each for each in found if "experts" in each.split(".")]


@pytest.mark.parametrize("name", NAMES)
def test_decoding_is_the_full_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshwright.model.room.LEAST", 1)  # so that room is doubled several times within twelve tokens
    model, tokens = built(one_layer(SAMPLES[name])).eval(), tokens_of()
    with torch.no_grad():
        whole = model(tokens)
        for stretches, cuts in STRETCHES.items():
            states = model.initial_state(B, S), model.initial_state(B)
            at_once, grown = (torch.cat([model.step(piece, state) for piece in tokens.split(cuts)]) for state in states)
            torch.testing.assert_close(at_once, whole, msg=lambda text, by=stretches: f"{by}: {text}")
            assert torch.equal(grown, at_once), f"{stretches}: room that grows changes numbers"


@pytest.mark.parametrize("name", NAMES)
def test_steps_under_autocast_are_the_full_pass_under_it(name: str) -> None:
    config = one_layer(SAMPLES[name])
    model, tokens = built(config, torch.float32).eval(), tokens_of()
    # Of two scores that are nearly the same, rounding may choose the one in a step and the other in the full pass.
    least = 0.75 if any(letter in config.pattern for letter in "EH[") else 1.0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = model(tokens)
        for stretches, cuts in STRETCHES.items():
            for state in (model.initial_state(B, S), model.initial_state(B)):
                stepped = torch.cat([model.step(piece, state) for piece in tokens.split(cuts)])
                assert stepped.dtype == whole.dtype == torch.bfloat16
                # Of 2^-9 of rounding in each of some 20 products and sums on the way to a logit: 3 % of the largest.
                near = (stepped - whole).abs().amax(-1) < 0.03 * whole.abs().max()
                assert near.float().mean() >= least, stretches


@pytest.mark.parametrize("name", SAMPLES)
def test_a_step_of_no_tokens_or_no_samples_gives_no_logits_and_changes_nothing(name: str) -> None:
    model, tokens = built(one_layer(SAMPLES[name])).eval(), tokens_of()
    state, usual = model.initial_state(B), model.initial_state(B)
    with torch.no_grad():
        for piece in tokens.split([7, 1, 4]):
            before = pickle.dumps(state)
            nothing = model.step(tokens[:0], state)
            assert pickle.dumps(state) == before
            logits = model.step(piece, state)
            assert torch.equal(logits, model.step(piece, usual))
            assert (nothing.shape, nothing.dtype) == ((0, *logits.shape[1:]), logits.dtype)
        assert model.step(tokens[:, :0], model.initial_state(0)).shape == (S, 0, logits.shape[2])
        for none in (tokens[:0], tokens[:, :0]):
            with pytest.raises(ValueError, match=r"^tokens of shape \[.*\]: must be at least 1 of at least 1 sample$"):
                model(none)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_layer_by_itself_takes_a_step_of_no_tokens_which_changes_nothing(name: str) -> None:
    config = one_layer(SAMPLES[name])
    x = torch.randn(4, B, config.hidden_size, dtype=F64)
    for layer, max_len in product(built(config).eval().layers.values(), (None, 9)):
        assert isinstance(layer, Layer)
        state, usual = layer.initial_state(B, max_len), layer.initial_state(B, max_len)
        with torch.no_grad():
            for piece in x.split([3, 1]):
                nothing = layer.step(x[:0], state)
                assert (nothing.shape, nothing.dtype) == ((0, *x.shape[1:]), F64)
                assert torch.equal(layer.step(piece, state), layer.step(piece, usual))


# What a router decides by the numbers of the tokens has a shape that is not known without them.
PLAIN = [name for name in SAMPLES if not any(letter in SAMPLES[name].pattern for letter in "EH[")]


@pytest.mark.parametrize("name", PLAIN)
def test_shapes_can_be_asked_of_a_model_without_weights(name: str) -> None:
    config = one_layer(SAMPLES[name])
    model, tokens = build_model(config, device="meta"), tokens_of().to("meta")
    assert model(tokens).shape == (S, B, VOCAB)
    assert model.step(tokens[:3], model.initial_state(B)).shape == (3, B, VOCAB)
    model(tokens, tokens).backward()
    assert {each.grad.shape == each.shape for each in model.parameters() if each.grad is not None} == {True}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_state_is_of_as_many_samples_as_it_was_made_for(name: str) -> None:
    model, tokens = built(one_layer(SAMPLES[name])).eval(), tokens_of()
    with torch.no_grad():
        for batch in (1, 3):
            with pytest.raises(ValueError, match=rf"^batch = 2 of the tokens: must be that of the state, {batch}$"):
                model.step(tokens, model.initial_state(batch))
        state = model.initial_state(B)
        model.step(tokens[:7], state)
        with pytest.raises(ValueError, match=r"^batch = 1 of the tokens: must be that of the state, 2$"):
            model.step(tokens[7:, :1], state)
        assert torch.equal(model.step(tokens[7:], copy.deepcopy(state)), model.step(tokens[7:], state))
    for sizes, line in {(-2,): "batch = -2: must be at least 0", (2, -3): "max_len = -3: must be at least 0"}.items():
        with pytest.raises(ValueError, match=f"^{line}$"):
            model.initial_state(*sizes)


def documents() -> Tensor:
    """Return documents of 3, 1, 5 and 3 tokens, and of 1, 6 and 5."""
    return torch.tensor([[0] * 3 + [1] + [2] * 5 + [3] * 3, [0] + [1] * 6 + [2] * 5]).T


def where_of(document: Tensor, *, apart: bool) -> Where:
    counted = torch.ones_like(document, dtype=torch.bool)
    more = {"step": 3, "step_tokens": float(document.numel()), "seed": 2, "mask_documents": apart}
    return place(torch.arange(B) + 5, document, counted, torch.arange(S), NO_TP, **more)


def modes(name: str) -> tuple[bool, ...]:
    """Return in which modes no token of one document bears on another: training and evaluation, or evaluation."""
    return (False,) if name.startswith(COMPETING) else (False, True)


@pytest.mark.parametrize("name", NAMES)
def test_another_document_changes_nothing(name: str) -> None:
    model, tokens, document = built(one_layer(SAMPLES[name])), tokens_of(), documents()
    for training, (sample, changed) in product(modes(name), ((0, 0), (0, 2), (1, 1))):
        own = torch.zeros(S, B, dtype=torch.bool)
        own[:, sample] = document[:, sample] == changed
        other = torch.where(own, (tokens + 5) % VOCAB, tokens)
        with torch.no_grad():
            before, after = (
                model.train(training)(text, None, where_of(document, apart=True)) for text in (tokens, other)
            )
        moved = (after - before).abs().amax(-1) > 1e-12 * before.abs().max()  # experts add up rows in another order
        assert not moved[~own].any()
        assert moved[own].all()


def documents_meet(name: str) -> bool:
    """Say whether, in training, another first or third document ever changes what the others of its sample give."""
    model, document = built(one_layer(SAMPLES[name])).train(), documents()
    for seed, changed in product(range(4), (0, 2)):
        tokens, own = tokens_of(seed), torch.zeros(S, B, dtype=torch.bool)
        own[:, 0] = document[:, 0] == changed
        other = torch.where(own, (tokens + 5) % VOCAB, tokens)
        with torch.no_grad():
            before, after = (model(text, None, where_of(document, apart=True)) for text in (tokens, other))
        moved = (after - before).abs().amax(-1) > 1e-12 * before.abs().max()
        assert not moved[:, 1].any(), "another sample"
        if moved[~own].any():
            return True
    return False


# What decides about a token's way, in the words of docs/parts.md, and the sample that has it.
ON_THE_PAGE = {f'router = "{router}"': f"router {router}" for router in ROUTERS} | {
    "capacity_factor": "router with capacity",
    "[ ]": "depth by sigmoid",
}


@pytest.mark.parametrize("key", ON_THE_PAGE)
def test_documents_meet_in_training_where_the_page_says_so(key: str) -> None:
    told = dict(re.findall(r"^\| `(.+?)`[^|]* \| (apart|meet) \|", PAGE.read_text(), re.MULTILINE))
    assert told.keys() == ON_THE_PAGE.keys()
    name = ON_THE_PAGE[key]
    assert documents_meet(name) is (told[key] == "meet") is name.startswith(COMPETING)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_KINDS)
def test_without_masks_documents_see_each_other(name: str) -> None:
    model, tokens = built(one_layer(SAMPLES[name])).eval(), tokens_of()
    with torch.no_grad():
        apart, together = (model(tokens, None, where_of(documents(), apart=mask)) for mask in (True, False))
    assert not torch.allclose(apart[4:, 0], together[4:, 0])
    torch.testing.assert_close(apart[:3, 0], together[:3, 0])


@pytest.mark.parametrize("name", NAMES)
def test_no_token_sees_the_future_or_another_sample(name: str) -> None:
    model, tokens = built(one_layer(SAMPLES[name])).eval(), tokens_of()
    changed = tokens.clone()
    changed[5:, 0] = (changed[5:, 0] + 1) % VOCAB
    with torch.no_grad():
        moved = (model(changed) - model(tokens)).abs().amax(-1) > 1e-11
    assert not moved[:5, 0].any()
    assert not moved[:, 1].any()
    assert moved[5:, 0].all()


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_KINDS)
def test_the_gradients_of_every_parameter_are_finite_differences(name: str) -> None:
    model = built(one_layer(SAMPLES[name], vocab_size=5))
    tokens, targets = torch.tensor([[0, 1], [2, 3], [4, 0], [1, 1]]), torch.tensor([[1, 2], [-100, 4], [0, 3], [2, 2]])
    document = torch.tensor([[0, 0], [0, 0], [0, 1], [0, 1]])
    place_of = where_of_plain_tokens(tokens)
    names, values = zip(*model.named_parameters(), strict=True)

    def loss(*parameters: Tensor) -> Tensor:
        at = replace(place_of, document_whole=document, mask_documents=True)
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (tokens, targets, at))

    # Fast mode compares the products of the two Jacobians with random vectors: one pass instead of one per element.
    held = tuple(value.detach().clone().requires_grad_() for value in values)
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(loss, held, fast_mode=True)
