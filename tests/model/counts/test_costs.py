"""Costs are counted by hand for one shape, and held to torch's own counter for another."""

import pytest

from meshwright.model.config import ModelConfig
from meshwright.model.counts.costs import (
    active_parameter_count,
    forward_flops_per_token,
    layer_forward_flops,
    output_forward_flops,
    parameter_count,
    training_flops_per_token,
)
from meshwright.model.counts.shapes import layer_weights
from meshwright.model.presets import preset

H, N, K, D, F, V, S = 48, 6, 2, 10, 112, 320, 7  # all different, so that a swapped size cannot pass unseen
E, TOP_K, EXPERT, SHARED = 5, 2, 20, 3
ALL_BIASES = ("q", "k", "v", "output", "ffn")
ATTENTION = 2 * H * N * D + 2 * H * K * D


def config(**changes: object) -> ModelConfig:
    sizes = {"num_layers": 2, "hidden_size": H, "num_heads": N, "num_kv_heads": K, "head_dim": D}
    return ModelConfig.model_validate({**sizes, "ffn_hidden_size": F, "vocab_size": V, **changes})


def moe_config(**changes: object) -> ModelConfig:
    moe = {"num_experts": E, "top_k": TOP_K, "expert_hidden_size": EXPERT, "num_shared_experts": SHARED}
    return config(pattern="*E", moe=moe, **changes)


def test_a_dense_layers_weights_are_counted() -> None:
    dense = config()
    layer = layer_weights(dense, dense.layers[0]).values()
    assert sum(weight.number for weight in layer) == ATTENTION + H + 3 * H * F + H
    assert parameter_count(dense) == 2 * (ATTENTION + H + 3 * H * F + H) + H + 2 * V * H


def test_biases_and_head_norms_are_counted() -> None:
    more = parameter_count(config(bias=ALL_BIASES, qk_norm=True)) - parameter_count(config())
    assert more == 2 * ((N * D + 2 * K * D + H) + (2 * F + H) + 2 * D)


def test_a_tied_embedding_counts_once() -> None:
    assert parameter_count(config()) - parameter_count(config(tie_embeddings=True)) == V * H


def test_the_experts_that_a_token_does_not_meet_are_not_active() -> None:
    sparse = moe_config()
    expert = 3 * H * EXPERT
    layer = ATTENTION + H + E * H + (E + SHARED) * expert + H
    assert parameter_count(sparse) == 2 * layer + H + 2 * V * H
    assert parameter_count(sparse) - active_parameter_count(sparse) == 2 * (E - TOP_K) * expert


def test_biases_of_experts_are_counted() -> None:
    more = parameter_count(moe_config(bias=("ffn",))) - parameter_count(moe_config())
    assert more == 2 * (E * (2 * EXPERT + H) + 2 * SHARED * EXPERT + H)


def test_a_forward_pass_is_two_operations_for_each_active_weight_and_the_attention() -> None:
    sparse = moe_config()
    weights = 2 * (ATTENTION + E * H + (TOP_K + SHARED) * 3 * H * EXPERT) + V * H
    assert forward_flops_per_token(sparse, S, causal=False) == 2 * weights + 2 * (4 * N * D * S)
    assert forward_flops_per_token(sparse, S) == 2 * weights + 2 * (4 * N * D * (S + 1) / 2)
    assert training_flops_per_token(sparse, S) == 3 * forward_flops_per_token(sparse, S)


def test_the_layers_and_the_output_make_the_whole() -> None:
    dense = config(num_layers=4, pattern="*-")
    layers = sum(layer_forward_flops(dense, kinds, S) for kinds in dense.layers)
    assert layers + output_forward_flops(dense) == forward_flops_per_token(dense, S)


def test_palms_formula_is_the_one_that_is_not_causal() -> None:
    """6 N + 12 L h s, N being the weights of products; the embedding is looked up, norms are left out."""
    dense = preset("gpt-small", vocab_size=50304)
    products = parameter_count(dense) - 50304 * 768 - 25 * 768
    assert training_flops_per_token(dense, 1024, causal=False) == pytest.approx(6 * products + 12 * 12 * 768 * 1024)


def test_torch_counts_the_same_operations_in_transformers_llama() -> None:
    """FlopCounterMode counts every position of attention, so the count that is not causal is held to it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from torch.utils.flop_counter import FlopCounterMode

    dense = config()
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=V,
            hidden_size=H,
            intermediate_size=F,
            num_hidden_layers=2,
            num_attention_heads=N,
            num_key_value_heads=K,
            head_dim=D,
            attn_implementation="eager",
        )
    )
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        llama(torch.zeros(1, S, dtype=torch.long))
    assert counter.get_total_flops() == forward_flops_per_token(dense, S, causal=False) * S
