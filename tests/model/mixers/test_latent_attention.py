"""Latent attention is transformers' DeepseekV3Attention; on meshes as on one process; decoding from latents alone."""

import pytest
import torch
from mixer_parity import assert_steps_are_the_whole, built, errors_on, too_far, where_of
from rank_pool import run_mesh
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from meshwright.model.mixers.attention import Look, Spread
from meshwright.model.mixers.latent_attention import LatentAttention, LatentSizes
from meshwright.model.positions import Rope, RopeScaling, yarn_scale
from meshwright.parallel.initialise import InitPolicy
from meshwright.parallel.mesh import Mesh, Sizes, single_process_mesh

S, B, H = 24, 2, 12
SIZES = LatentSizes(num_heads=4, kv_lora_rank=5, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=3, q_lora_rank=7)
F64 = torch.float64
DOCUMENT = (torch.arange(S)[:, None] >= torch.tensor([5, 17])).long()


def make(mesh: Mesh, way: str = "ring", q_lora_rank: int = 7, look: Look | None = None) -> LatentAttention:
    spread = Spread(tp=mesh.tp, cp=mesh.cp, context=way)
    sizes = SIZES._replace(q_lora_rank=q_lora_rank)
    look = look or Look(Rope(50.0))
    init = InitPolicy("normal", std=0.4)
    return LatentAttention(H, sizes, look=look, norm_eps=1e-3, bias=bool(q_lora_rank), init=init, spread=spread)


def x_of(s: int = S) -> torch.Tensor:
    return torch.randn(s, B, H, dtype=F64, generator=torch.Generator().manual_seed(1))


def case(mesh: Mesh, way: str) -> dict[str, float]:
    found = {}
    for rank in (7, 0):
        errors = errors_on(mesh, lambda on, rank=rank: make(on, way, rank), x_of(), DOCUMENT, True, True)
        found |= {f"{rank}, {name}": error for name, error in errors.items()}
    return found


@pytest.mark.parametrize(
    ("sizes", "way"),
    [
        (Sizes(cp=2), "ulysses"),
        pytest.param(Sizes(tp=2, cp=2), "ulysses", marks=pytest.mark.slow),
    ],
)
def test_latent_attention_on_a_mesh_is_that_of_one_process(sizes: Sizes, way: str) -> None:
    assert too_far(run_mesh(sizes, case, way)) == {}


@pytest.mark.parametrize("q_lora_rank", [7, 0])
@pytest.mark.parametrize("cuts", [[3, 1, 12, 1, 1, 6], [S]])
def test_steps_from_latents_are_the_full_pass(q_lora_rank: int, cuts: list[int]) -> None:
    part = built(lambda mesh: make(mesh, q_lora_rank=q_lora_rank))
    state = assert_steps_are_the_whole(part, x_of(), cuts)
    assert state.rows.shape == (S, B, SIZES.kv_lora_rank + SIZES.qk_rope_head_dim)
    with pytest.raises(ValueError, match="the cache has room for 24 tokens, 25 are needed"):
        part.step(x_of(1), state)


def permuted(rows: torch.Tensor, r: int) -> torch.Tensor:
    """Put interleaved pairs (0, 1), (2, 3), ... of rows [.., r, h] as halves: all firsts, then all seconds."""
    return torch.cat([rows[..., 0:r:2, :], rows[..., 1:r:2, :]], -2)


@pytest.mark.parametrize("q_lora_rank", [7, None])
@pytest.mark.parametrize("scaling", [None, RopeScaling("yarn", 4.0, 8, mscale=0.9, mscale_all_dim=0.7)])
def test_latent_attention_is_that_of_transformers(q_lora_rank: int | None, scaling: RopeScaling | None) -> None:
    rope = {"rope_type": "default", "rope_theta": 50.0}
    if scaling is not None:
        rope |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
        rope |= {"mscale": 0.9, "mscale_all_dim": 0.7}
    n, c, p, r, e, _ = SIZES
    config = DeepseekV3Config(
        hidden_size=H, num_attention_heads=n, num_key_value_heads=n, q_lora_rank=q_lora_rank, kv_lora_rank=c,
        qk_nope_head_dim=p, qk_rope_head_dim=r, v_head_dim=e, attention_bias=bool(q_lora_rank), rope_parameters=rope,
        max_position_embeddings=32, attn_implementation="eager",
    )  # fmt: skip
    theirs = DeepseekV3Attention(config, layer_idx=0).to(F64)
    scale = None if scaling is None else (p + r) ** -0.5 * yarn_scale(4.0, 0.7) ** 2
    ours = built(
        lambda mesh: make(mesh, q_lora_rank=q_lora_rank or 0, look=Look(Rope(50.0, scaling=scaling), scale=scale))
    )
    for norm in (ours.kv_a_norm, ours.q_a_norm):
        if norm is not None:
            norm.eps = 1e-6
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=F64) * 0.5)
        queries = theirs.q_b_proj if q_lora_rank else theirs.q_proj
        wide = queries.weight.unflatten(0, (n, p + r))
        wide = torch.cat([wide[:, :p], permuted(wide[:, p:], r)], 1).flatten(0, 1)
        (ours.q_b if q_lora_rank else ours.q).weight.copy_(wide)
        both = theirs.kv_b_proj.weight.unflatten(0, (n, p + e))
        ours.k_b.weight.copy_(both[:, :p].flatten(0, 1))
        ours.v_b.weight.copy_(both[:, p:].flatten(0, 1))
        down = theirs.kv_a_proj_with_mqa
        ours.kv_a.weight.copy_(down.weight[:c])
        ours.k_rope.weight.copy_(permuted(down.weight[c:], r))
        ours.kv_a_norm.weight.copy_(theirs.kv_a_layernorm.weight)
        ours.output.weight.copy_(theirs.o_proj.weight)
        if q_lora_rank:
            ours.q_a.weight.copy_(theirs.q_a_proj.weight)
            ours.q_a.bias.copy_(theirs.q_a_proj.bias)
            ours.q_a_norm.weight.copy_(theirs.q_a_layernorm.weight)
            ours.kv_a.bias.copy_(down.bias[:c])
            ours.k_rope.bias.copy_(permuted(down.bias[c:, None], r)[:, 0])
            ours.output.bias.copy_(theirs.o_proj.bias)
    x = x_of()
    angles = DeepseekV3RotaryEmbedding(config)(x.transpose(0, 1), torch.arange(S)[None])
    mask = torch.full((S, S), -torch.inf, dtype=F64).triu(1)[None, None]
    expected = theirs(x.transpose(0, 1), angles, mask)[0].transpose(0, 1)
    where = where_of(torch.zeros(S, B, dtype=torch.int64), single_process_mesh(), by_document=False)
    # transformers computes the angles in fp32.
    torch.testing.assert_close(ours(x, where, None), expected, rtol=1e-5, atol=2e-6)


def test_what_latents_do_not_have_is_refused() -> None:
    for look in (Look(None), Look(window=4), Look(is_causal=False), Look(Rope(fraction=0.5))):
        with pytest.raises(ValueError, match="latent attention is causal, to all tokens, with rotary positions"):
            LatentAttention(H, SIZES, look=look)
