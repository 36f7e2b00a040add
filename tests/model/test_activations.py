"""What a forward pass keeps: counted by hand, and held against what torch really saves."""

import pytest
import torch
from torch import Tensor

from meshwright.model.activations import ActivationBytes, Degrees, Held, Types, activation_bytes, layer_bytes
from meshwright.model.config import ModelConfig, MoeConfig
from meshwright.model.parts import build_model

SIZES = {"num_layers": 2, "hidden_size": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "vocab_size": 64}
MOE = MoeConfig(num_experts=4, top_k=2, expert_hidden_size=40, num_shared_experts=1)
CONFIGS = {
    "dense": ModelConfig(pattern="*-", ffn_hidden_size=160, **SIZES),
    "normed": ModelConfig(pattern="*-", ffn_hidden_size=160, qk_norm=True, **SIZES),
    "moe": ModelConfig(pattern="*E", moe=MOE, **SIZES),
}
# 8 billion weights: 32 layers, hidden 4096, 32 heads and 8 key heads of width 128, feed-forward 14336.
LARGE = ModelConfig(pattern="*-", num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=8,
                    head_dim=128, ffn_hidden_size=14336, vocab_size=128256)  # fmt: skip
BF16 = Types(stream=2, product=2)
MILLION, ALL = 1 << 20, frozenset(range(32))


def saved_bytes(config: ModelConfig, tokens: Tensor, autocast: bool) -> int:
    """Return the bytes of all storages that a forward pass saves for its backward, but those of the weights."""
    model, saved = build_model(config), {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(tokens, tokens)
        assert loss.requires_grad
        return sum(saved.values())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_count_is_what_torch_saves(name: str, autocast: bool) -> None:
    config, tokens = CONFIGS[name], torch.randint(0, 64, (512, 4))
    saved = saved_bytes(config, tokens, autocast)
    counted = activation_bytes(config, tokens.numel(), Degrees(), Types(4, 2 if autocast else 4, autocast))
    assert counted.at_work == 0
    # Left out: the norms' factors, routing, the token ids, and under autocast bf16 copies of these few weights.
    assert counted.kept <= saved <= 1.05 * counted.kept


def test_a_million_tokens_of_eight_billion_weights_by_hand() -> None:
    """On 32 x 8 ranks, in bf16: for a token stream 1024, normed 8192, heads (8 + 2) * 128 * 2 and 4 sums of 4 bytes."""
    attention = 1024 + 8192 + 2560 + 16
    mlp = 1024 + 8192 + 3 * 1792 * 2
    head, ring = 1024 + 4096 * 4, 2 * 128 * 2 * (2 + 4)
    spread, held = Degrees(cp=32, tp=8), 32_768
    whole = activation_bytes(LARGE, MILLION, spread, BF16)
    assert whole == ActivationBytes((32 * (attention + mlp) + head) * held, ring * held)
    assert whole.kept == 33_873_199_104  # 31.5 GiB
    again = activation_bytes(LARGE, MILLION, spread, BF16, Held(ALL, ALL))
    assert again == ActivationBytes((32 * 1024 + head) * held, (attention + mlp + ring) * held)
    assert again.total == 2_785_542_144  # 2.6 GiB


def test_one_rank_would_need_terabytes_for_a_million_tokens() -> None:
    attention = 2 * 8192 + (64 + 16) * 128 * 2 + 32 * 4
    mlp = 2 * 8192 + 3 * 14336 * 2
    found = activation_bytes(LARGE, MILLION, Degrees(), BF16)
    assert found == ActivationBytes((32 * (attention + mlp) + 4096 * 6) * MILLION, 0.0)
    assert found.total == 4_702_989_189_120


def test_experts_count_their_rows_and_every_other_layer_may_be_recomputed() -> None:
    """moe in fp32 on tp = 2, etp = 2; two rows of half the tokens, gathered over etp."""
    spread = Degrees(tp=2, etp=2)
    attention = (96 / 2 + 96) * 4 + (4 + 2) * 16 * 4 + 2 * 4
    routed = 2 / 2 * (96 * 2 + 96 + 3 * 40) * 4
    moe = 2 * 96 / 2 * 4 + routed + (96 + 3 * 40 / 2) * 4
    assert layer_bytes(CONFIGS["moe"], CONFIGS["moe"].layers[0], spread, Types()) == attention + moe
    found = activation_bytes(CONFIGS["moe"], 10, spread, Types(), Held(frozenset({0, 1}), frozenset({0})))
    head = 96 * (4 / 2 + 4)
    assert found == ActivationBytes((96 / 2 * 4 + attention + moe + head) * 10, (attention + moe) * 10)
