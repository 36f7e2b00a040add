"""Attention against a loop over queries and keys, and against transformers' Llama attention."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from meshwright.model.mixers.attention import Attention, Heads, Look, Products, rms_norms
from meshwright.model.mixers.attention_norms import NO_NORMS
from meshwright.model.positions import Rope
from meshwright.parallel.where import Where, where_of_plain_tokens

S, B, H, N, K, D = 7, 2, 12, 6, 2, 4
EPS, BASE = 1e-3, 50.0


def randomised(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


def biases(*names: str) -> Products:
    return Products(frozenset(names))


def attention(**changes: object) -> Attention:
    usual = {"look": Look(Rope(BASE)), "norms": rms_norms(EPS), "products": biases("q", "k", "v", "output")}
    options = usual | changes
    return randomised(Attention(H, Heads(N, K, D), **options).double())


def x_of(s: int = S) -> Tensor:
    return torch.randn(s, B, H, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def where(start: int = 0, document: Tensor | None = None) -> Where:
    plain = where_of_plain_tokens(torch.zeros(S, B, dtype=torch.int64))
    changes: dict[str, Any] = {"position_mixed": plain.position_mixed + start}
    if document is not None:
        changes |= {"document_whole": document, "mask_documents": True}
    return replace(plain, **changes)


def turned(vector: Tensor, position: int) -> Tensor:
    """Turn feature i and i + d/2 by position * base^(-2i/d)."""
    out = vector.clone()
    for i in range(D // 2):
        angle = position * BASE ** (-2 * i / D)
        a, b = vector[i], vector[i + D // 2]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + D // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def by_loop(part: Attention, x: Tensor, place: Where) -> Tensor:
    def project(name: str, token: Tensor) -> Tensor:
        layer = getattr(part, name)
        return layer.weight @ token + (layer.bias if layer.bias is not None else 0)

    def head(name: str, token: Tensor, index: int, position: int) -> Tensor:
        vector = project(name, token)[index * D : (index + 1) * D]
        norm = getattr(part, f"{name}_norm")
        if norm is not None:
            vector = vector / torch.sqrt(vector.square().mean() + EPS) * norm.weight
        return turned(vector, position)

    rows = torch.zeros(S, B, H, dtype=x.dtype)
    for b in range(B):
        for i in range(S):
            heads = []
            for n in range(N):
                kv = n // (N // K)
                q = head("q", x[i, b], n, int(place.position_mixed[i]))
                seen = [
                    j
                    for j in range(i + 1)
                    if not place.mask_documents or place.document_whole[j, b] == place.document_whole[i, b]
                ]
                k = torch.stack([head("k", x[j, b], kv, int(place.position_mixed[j])) for j in seen])
                v = torch.stack([project("v", x[j, b])[kv * D : (kv + 1) * D] for j in seen])
                heads.append((k @ q / math.sqrt(D)).softmax(0) @ v)
            rows[i, b] = project("output", torch.cat(heads))
    return rows


DOCUMENTS = torch.tensor([[0, 5], [0, 5], [0, 6], [1, 6], [1, 6], [1, 6], [2, 6]])


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({}, where()),
        ({"products": biases(), "norms": NO_NORMS}, where(start=11)),
        ({"products": biases("k"), "norms": NO_NORMS}, where(document=DOCUMENTS)),
    ],
)
def test_attention_is_a_loop_over_what_each_token_sees(changes: dict[str, object], place: Where) -> None:
    part, x = attention(**changes), x_of().requires_grad_()
    y, expected = part(x, place, None), by_loop(part, x, place)
    torch.testing.assert_close(y, expected)
    above = torch.randn_like(expected)
    of = [x, *part.parameters()]
    pairs = zip(torch.autograd.grad(y, of, above), torch.autograd.grad(expected, of, above), strict=True)
    for gradient, wanted in pairs:
        torch.testing.assert_close(gradient, wanted)


def test_only_the_distance_of_two_tokens_counts() -> None:
    part = attention()
    torch.testing.assert_close(part(x_of(), where(start=1000), None), part(x_of(), where(), None))


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_attention_is_that_of_transformers(qkv_bias: bool) -> None:
    config = LlamaConfig(
        hidden_size=H,
        num_attention_heads=N,
        num_key_value_heads=K,
        head_dim=D,
        attention_bias=qkv_bias,
        rope_parameters={"rope_type": "default", "rope_theta": BASE},
        attn_implementation="eager",
    )
    theirs = randomised(LlamaAttention(config, layer_idx=0).double())
    ours = attention(products=biases("q", "k", "v", "output") if qkv_bias else biases(), norms=NO_NORMS)
    with torch.no_grad():
        for mine, name in ((ours.q, "q_proj"), (ours.k, "k_proj"), (ours.v, "v_proj"), (ours.output, "o_proj")):
            mine.weight.copy_(getattr(theirs, name).weight)
            if qkv_bias:
                mine.bias.copy_(getattr(theirs, name).bias)
    x, start = x_of(), 5
    cos_sin = LlamaRotaryEmbedding(config)(x.transpose(0, 1), torch.arange(start, start + S)[None])
    mask = torch.full((S, S), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    expected = theirs(x.transpose(0, 1), cos_sin, mask)[0].transpose(0, 1)
    # transformers computes the angles in fp32: 1e-7 of an angle of up to 12.
    torch.testing.assert_close(ours(x, where(start=start), None), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [[1] * S, [3, 1, 3], [S]])
def test_tokens_one_after_the_other_give_what_the_whole_sequence_gives(steps: list[int]) -> None:
    part, x = attention(), x_of()
    state, pieces = part.initial_state(B, S), []
    for piece in x.split(steps):
        pieces.append(part.step(piece, state))
    torch.testing.assert_close(torch.cat(pieces), part(x, where(), None))
    with pytest.raises(ValueError, match="the cache has room for 7 tokens, 8 are needed"):
        part.step(x[:1], state)


def test_the_angles_of_far_positions_are_exact() -> None:
    position = 1_000_003
    cos, sin = Rope(10_000.0).angles(torch.tensor([position]), 8, torch.float32)
    assert cos.dtype == torch.float32
    for i in range(4):
        angle = position * 10_000.0 ** (-2 * i / 8)  # in fp32 the angle itself would be off by 0.03
        assert cos[0, i].item() == pytest.approx(math.cos(angle), abs=1e-6)
        assert sin[0, i].item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_heads_that_do_not_share_evenly_are_refused() -> None:
    with pytest.raises(ValueError, match="num_heads = 6 does not divide by num_kv_heads = 4"):
        Attention(H, Heads(6, 4, D))


def test_layers_of_one_micro_batch_share_their_angles() -> None:
    place, part = where(), attention()
    part(x_of(), place, None)
    key = f"rope/{D}/torch.float64/{Rope(BASE)}"
    angles = place.derived[key]
    part(x_of(), place, None)
    assert place.derived[key] is angles
    other = Attention(H, Heads(N, K, D), look=Look(Rope(7.0))).double()
    other(x_of(), place, None)
    assert len([key for key in place.derived if key.startswith("rope/")]) == 2
