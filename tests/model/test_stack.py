"""The whole model: losses, gradients by finite differences, a document alone, and its two ends."""

from dataclasses import replace

import engine_cases
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meshwright.model.block import Block, Layer
from meshwright.model.config import ModelConfig
from meshwright.model.kinds.feedforward.moe import MoeConfig
from meshwright.model.mixers.attention import Attention, Heads, Look
from meshwright.model.mixers.switch_head import SwitchHead, SwitchSizes
from meshwright.model.norms import RMSNorm
from meshwright.model.parts import build_model, initialise
from meshwright.model.stack import LanguageModel
from meshwright.parallel.initialise import InitPolicy
from meshwright.parallel.tally import Tally, declared_entries
from meshwright.parallel.tensor.vocabulary import Embedding, VocabularyRows
from meshwright.parallel.where import Where, where_of_plain_tokens

S, B, V = 9, 3, engine_cases.VOCAB
CONFIGS = {
    "dense": engine_cases.dense_config(tie_embeddings=True, bias=("q", "ffn")),
    "moe": engine_cases.moe_config(bias=("k", "ffn")),
    "mixed": engine_cases.moe_config(pattern="*-*E", num_layers=4),
}


def built(config: ModelConfig, dtype: torch.dtype = torch.float64) -> LanguageModel:
    model = build_model(config, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():  # large, so that every path matters, and no norm or bias is 1 or 0
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return model


def tokens_of(seed: int = 0, s: int = S) -> Tensor:
    return torch.randint(0, V, (s, B), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_is_the_cross_entropy_of_the_logits_over_the_tokens_of_the_step(name: str) -> None:
    model, tokens, targets = built(CONFIGS[name]), tokens_of(), tokens_of(1)
    targets[4:, 1] = -100
    logits = model(tokens)
    assert logits.shape == (S, B, V)
    summed = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100)
    plain = where_of_plain_tokens(tokens)
    of_step = replace(plain, step_tokens=100.0)
    torch.testing.assert_close(model(tokens, targets), summed / (targets != -100).sum())
    torch.testing.assert_close(model(tokens, targets, of_step), summed / 100)


def test_a_masked_document_is_computed_as_if_it_stood_alone() -> None:
    # RoPE knows distances only, so that a document in the middle of a sample is the document at its beginning.
    model, tokens = built(CONFIGS["dense"]), tokens_of()
    document = (torch.arange(S) >= 4).long()[:, None].expand(S, B)
    plain = where_of_plain_tokens(tokens)
    masked = replace(plain, document_whole=document, mask_documents=True)
    unmasked = replace(plain, document_whole=document)
    with torch.no_grad():
        together, alone, whole = model(tokens, None, masked), model(tokens[4:]), model(tokens)
        torch.testing.assert_close(together[4:], alone)
        torch.testing.assert_close(together[:4], whole[:4])
        torch.testing.assert_close(model(tokens, None, unmasked), whole)
    assert not torch.allclose(together[4:], whole[4:])


TINY = {"num_layers": 2, "hidden_size": 4, "num_heads": 2, "num_kv_heads": 1, "head_dim": 2, "ffn_hidden_size": 3}
EXPERTS = MoeConfig(num_experts=3, top_k=2, expert_hidden_size=2, num_shared_experts=1)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(**TINY, vocab_size=5, tie_embeddings=True, bias=("q", "k", "v", "output", "ffn")),
        ModelConfig(**TINY, vocab_size=5, pattern="*E", qk_norm=True, moe=EXPERTS, bias=("ffn",)),
    ],
)
def test_the_gradient_of_every_parameter_is_that_of_finite_differences(config: ModelConfig) -> None:
    model = built(config)
    tokens, targets = torch.tensor([[0, 1], [2, 3], [4, 0]]), torch.tensor([[1, 2], [-100, 4], [0, 3]])
    names, values = zip(*model.named_parameters(), strict=True)

    def loss(*parameters: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (tokens, targets))

    # Fast mode compares the products of the two Jacobians with random vectors: one pass instead of one per element.
    assert torch.autograd.gradcheck(loss, tuple(v.detach().clone().requires_grad_() for v in values), fast_mode=True)


def test_a_sample_of_padding_gives_an_exact_zero_that_goes_backward() -> None:
    model = build_model(engine_cases.moe_config(z_loss_weight=0.0, load_balancing="none"))
    tally = Tally(declared_entries(model))
    tokens = tokens_of()
    plain = where_of_plain_tokens(tokens)
    where = replace(plain, counted=torch.zeros(S, B, dtype=torch.bool), step_tokens=50.0)
    loss = model(tokens, torch.full((S, B), -100), where, tally)
    loss.backward()
    assert loss.item() == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad == 0).all(), name


def test_a_tied_model_has_one_matrix_for_both_ends() -> None:
    tied, untied = build_model(CONFIGS["dense"]), build_model(CONFIGS["moe"])
    assert tied.output is None
    assert tied.output_rows is tied.embedding
    assert "output.weight" not in dict(tied.named_parameters())
    assert untied.output_rows.weight is dict(untied.named_parameters())["output.weight"]


def test_layers_carry_their_global_number() -> None:
    model = build_model(CONFIGS["mixed"])
    last = LanguageModel({3: model.layers["3"]}, embedding=None, final_norm=model.final_norm, output=model.output)
    assert "layers.3.feedforward.part.router.weight" in dict(last.named_parameters())
    assert set(declared_entries(model)) == {f"layers.{n}.{what}" for n in (1, 3) for what in ("load", "balance", "z")}


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_narrow_types_stay_near_the_wide_ones(name: str, precision: str) -> None:
    # 2^-9 of rounding in each of about 20 products and sums on the way to a logit: 3 percent of the largest.
    exact = built(CONFIGS[name], torch.float32)
    narrow = built(CONFIGS[name], torch.float32)
    if precision == "bf16":
        narrow.bfloat16()
    tokens, targets = tokens_of(), tokens_of(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        loss = narrow(tokens, targets)
    expected = exact(tokens, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.03)
    loss.backward()
    expected.backward()
    for found, wanted in zip(narrow.parameters(), exact.parameters(), strict=True):
        assert found.grad.dtype == found.dtype
        error = (found.grad - wanted.grad).norm() / wanted.grad.norm()
        assert error < (0.3 if name == "moe" else 0.1)  # a few tokens of 27 change their expert


class SeesAll(torch.nn.Module):
    """A user's own mixer of all tokens, which says so."""

    sees_later_tokens = True

    def forward(self, x: Tensor, where: Where, tally: Tally | None) -> Tensor:
        return x.mean(0, keepdim=True).expand_as(x)


H, BOTH_SIDES = 16, Look(is_causal=False)


def stack_of(*mixers: torch.nn.Module) -> LanguageModel:
    layers = {at: Layer(Block(mixer, norm=RMSNorm(H, 1e-5)), None) for at, mixer in enumerate(mixers)}
    rows = VocabularyRows(V, H, rule=InitPolicy().matrix(H, V))
    return LanguageModel(layers, embedding=Embedding(V, H), final_norm=RMSNorm(H, 1e-5), output=rows)


@pytest.mark.parametrize(
    "mixer",
    [
        Attention(H, Heads(2, 2, 8), look=BOTH_SIDES),
        SwitchHead(H, SwitchSizes(2, 8, 4), look=BOTH_SIDES),
        SeesAll(),
    ],
    ids=["attention", "switch_head", "a user's own"],
)
def test_a_decoder_refuses_parts_that_see_later_tokens_by_their_name(mixer: torch.nn.Module) -> None:
    causal = Attention(H, Heads(2, 2, 8))
    stack_of(causal)
    with pytest.raises(ValueError, match=r"^layers\.1\.mixer\.part.* sees later tokens.*is_causal = True, would fit$"):
        stack_of(causal, mixer)
    initialise(mixer)
    x = torch.randn(S, B, H)
    assert mixer(x, where_of_plain_tokens(tokens_of()), None).shape == x.shape  # by itself it works
