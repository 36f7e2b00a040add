"""Mixtures of experts with the same weights are those of transformers, outputs and gradients, in fp32."""

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, OlmoeConfig, Qwen3MoeConfig, Qwen3NextConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextSparseMoeBlock

from meshwright.model.feedforward.experts import Experts
from meshwright.model.feedforward.mlp import Inner, Mlp
from meshwright.model.feedforward.moe import Moe, SharedGate
from meshwright.model.parts import initialise
from meshwright.model.routers.router import Ways
from meshwright.model.routers.table import make_router
from meshwright.parallel.initialise import InitPolicy
from meshwright.parallel.where import where_of_plain_tokens

S, B, H, F, E, K = 9, 2, 8, 6, 8, 3
SIZES = {"hidden_size": H, "num_experts_per_tok": K, "hidden_act": "silu"}
INIT = InitPolicy(std=0.5)


def ours_of(router: str, ways: Ways, shared: int = 0, shared_gate: bool = False, activation: str = "swiglu") -> Moe:
    inner = Inner(activation)
    part = Moe(
        make_router(router, H, E, K, ways, init=INIT),
        Experts(H, F, E, inner, init=INIT),
        shared=Mlp(H, shared, inner, init=INIT) if shared else None,
        shared_gate=SharedGate(H, init=INIT) if shared_gate else None,
    )
    initialise(part, seed=3)
    return part


def deepseek(activation: str = "swiglu") -> tuple[Moe, nn.Module]:
    config = DeepseekV3Config(
        **{**SIZES, "hidden_act": {"swiglu": "silu", "geglu": "gelu_pytorch_tanh"}[activation]},
        n_routed_experts=E, moe_intermediate_size=F, n_shared_experts=2, n_group=4, topk_group=2,
        routed_scaling_factor=2.5, norm_topk_prob=True,
    )  # fmt: skip
    ways = Ways(True, 2.5, num_groups=4, top_groups=2)
    ours, theirs = ours_of("sigmoid", ways, 2 * F, activation=activation), DeepseekV3MoE(config)
    with torch.no_grad():
        ours.router.bias.copy_(torch.linspace(-0.3, 0.3, E))
        theirs.gate.e_score_correction_bias.copy_(ours.router.bias)
    return ours, theirs


def qwen3() -> tuple[Moe, nn.Module]:
    config = Qwen3MoeConfig(**SIZES, num_experts=E, moe_intermediate_size=F, norm_topk_prob=True)
    return ours_of("softmax", Ways(True)), Qwen3MoeSparseMoeBlock(config)


def olmoe() -> tuple[Moe, nn.Module]:
    config = OlmoeConfig(**SIZES, num_experts=E, intermediate_size=F, norm_topk_prob=False)
    return ours_of("softmax", Ways(False)), OlmoeSparseMoeBlock(config)


def qwen3_next() -> tuple[Moe, nn.Module]:
    config = Qwen3NextConfig(
        **SIZES, num_experts=E, moe_intermediate_size=F, shared_expert_intermediate_size=5, norm_topk_prob=True
    )
    return ours_of("softmax", Ways(True), 5, shared_gate=True), Qwen3NextSparseMoeBlock(config)


BLOCKS = {
    "deepseek_v3": deepseek,
    "deepseek_v3 with geglu": lambda: deepseek("geglu"),
    "qwen3_moe": qwen3,
    "olmoe": olmoe,
    "qwen3_next": qwen3_next,
}


def pairs_of(ours: Moe, theirs: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter, slice | None]]:
    """Return our parameters, theirs, and which rows of theirs ours is."""
    experts = theirs.experts
    pairs = [
        (ours.router.weight, theirs.gate.weight, None),
        (ours.experts.gate, experts.gate_up_proj, slice(0, F)),
        (ours.experts.up, experts.gate_up_proj, slice(F, 2 * F)),
        (ours.experts.down, experts.down_proj, None),
    ]
    if ours.shared is not None:
        shared = theirs.shared_experts if hasattr(theirs, "shared_experts") else theirs.shared_expert
        for name in ("gate", "up", "down"):
            pairs.append((getattr(ours.shared, name).weight, getattr(shared, f"{name}_proj").weight, None))
    if ours.shared_gate is not None:
        pairs.append((ours.shared_gate.weight, theirs.shared_expert_gate.weight, None))
    return pairs


def rows_of(x: Tensor, rows: slice | None) -> Tensor:
    return x if rows is None else x[:, rows]


@pytest.mark.parametrize("name", BLOCKS)
def test_a_mixture_is_that_of_transformers(name: str) -> None:
    ours, theirs = BLOCKS[name]()
    with torch.no_grad():
        for mine, other, rows in pairs_of(ours, theirs):
            rows_of(other, rows).copy_(mine)
    x = torch.randn(S, B, H, generator=torch.Generator().manual_seed(1)).requires_grad_()
    other_x = x.detach().transpose(0, 1).contiguous().requires_grad_()
    y, expected = ours(x, where_of_plain_tokens(torch.zeros(S, B, dtype=torch.int64)), None), theirs(other_x)
    torch.testing.assert_close(y, expected.transpose(0, 1))
    y.square().sum().backward()
    expected.square().sum().backward()
    # Sums of many terms in fp32, in another order: what cancels is as inexact as the largest of them.
    torch.testing.assert_close(
        x.grad, other_x.grad.transpose(0, 1), rtol=0.0, atol=1e-5 * float(other_x.grad.abs().max())
    )
    for mine, other, rows in pairs_of(ours, theirs):
        torch.testing.assert_close(mine.grad, rows_of(other.grad, rows), rtol=1e-4, atol=1e-5)
