"""With the same weights our mixers give what those of transformers give: outputs, and all gradients."""

import pytest
import torch
from mixer_parity import randomised, where_of
from torch import Tensor, nn
from transformers import GraniteMoeHybridConfig, Mamba2Config, MambaConfig, Qwen3NextConfig
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from meshwright.model.mixers.gated_delta import DeltaSizes, GatedDelta
from meshwright.model.mixers.mamba1 import Mamba1, Mamba1Sizes
from meshwright.model.mixers.mamba2 import Mamba2, Mamba2Sizes
from meshwright.parallel.mesh import single_process_mesh

S, B, H = 13, 2, 8

Pair = tuple[nn.Parameter, Tensor]
"""One of our parameters, and the stretch of transformers' that it is."""


def rows(whole: Tensor, ours: list[Tensor]) -> list[Pair]:
    """Cut a fused parameter in ours, in this order."""
    parts = whole.split([each.shape[0] for each in ours])
    return [(mine, part.view(mine.shape)) for mine, part in zip(ours, parts, strict=True)]


def compare(ours: nn.Module, theirs: nn.Module, pairs: list[Pair]) -> None:
    """Compare outputs and gradients in fp32; `pairs` are filled here."""
    with torch.no_grad():
        for mine, its in pairs:
            mine.copy_(its)
    x = torch.randn(S, B, H, generator=torch.Generator().manual_seed(1))
    mine_in, its_in = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = ours(mine_in, where_of(torch.zeros(S, B, dtype=torch.int64), single_process_mesh()), None)
    wanted = theirs(its_in.transpose(0, 1))
    wanted = (wanted[0] if isinstance(wanted, tuple) else wanted).transpose(0, 1)
    close(y, wanted)
    above = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    y.backward(above)
    wanted.backward(above)
    close(mine_in.grad, its_in.grad)
    assert {id(mine) for mine, _ in pairs} == {id(each) for each in ours.parameters()}


def close(ours: Tensor | None, theirs: Tensor | None) -> None:
    assert ours is not None
    assert theirs is not None
    # Sums of up to 13 x 16 products in another order; fp32 rounds by 2^-24 each time.
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=64 * 2.0**-24 * theirs.abs().max().item())


def mamba2_pairs(ours: Mamba2, theirs: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Name the fused parameter of transformers that each list of ours makes up, in its order."""
    columns, convs = (ours.z, ours.x, ours.B, ours.C, ours.dt), (ours.conv_x, ours.conv_B, ours.conv_C)
    found = {
        "in_proj.weight": [each.weight for each in columns],
        "conv1d.weight": [each.weight for each in convs],
        "conv1d.bias": [each.bias for each in convs],
        "out_proj.weight": [ours.output.weight],
        "norm.weight": [ours.norm.weight],
        "A_log": [ours.A_log],
        "D": [ours.D],
        "dt_bias": [ours.dt_bias],
    }
    if ours.output.bias is not None:
        found |= {"in_proj.bias": [each.bias for each in columns], "out_proj.bias": [ours.output.bias]}
    return found


def assert_equal_to(theirs: nn.Module, ours: nn.Module, fused: dict[str, list[nn.Parameter]]) -> None:
    """Give ours the weights of theirs, and compare outputs, the gradient of x and those of all weights."""
    randomised(theirs)
    assert set(fused) == {name for name, each in theirs.named_parameters() if each.requires_grad}
    pairs = [pair for name, mine in fused.items() for pair in rows(theirs.get_parameter(name), mine)]
    compare(ours, theirs, pairs)
    for name, mine in fused.items():
        its = theirs.get_parameter(name).grad
        assert its is not None
        for parameter, gradient in rows(its, mine):
            close(parameter.grad, gradient)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_mamba2_is_that_of_transformers(groups: int, bias: bool) -> None:
    sizes = Mamba2Sizes(num_heads=4, head_dim=4, num_groups=groups, state_size=5, conv_kernel=4, chunk_size=4)
    config = Mamba2Config(
        hidden_size=H,
        num_heads=4,
        head_dim=4,
        n_groups=groups,
        state_size=5,
        conv_kernel=4,
        chunk_size=8,
        use_bias=bias,
        layer_norm_epsilon=1e-3,
        num_hidden_layers=1,
    )
    ours = Mamba2(H, sizes, norm_eps=1e-3, bias=bias)
    theirs = Mamba2Mixer(config, layer_idx=0)
    assert_equal_to(theirs, ours, mamba2_pairs(ours, theirs))


def test_mamba2_is_that_of_granite() -> None:
    config = GraniteMoeHybridConfig(
        hidden_size=H,
        mamba_n_heads=4,
        mamba_d_head=4,
        mamba_n_groups=1,
        mamba_d_state=5,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_chunk_size=8,
        rms_norm_eps=1e-4,
        num_hidden_layers=1,
        layer_types=["mamba"],
    )
    sizes = Mamba2Sizes(num_heads=4, head_dim=4, num_groups=1, state_size=5, conv_kernel=4, chunk_size=4)
    ours = Mamba2(H, sizes, norm_eps=1e-4)
    theirs = GraniteMoeHybridMambaLayer(config, layer_idx=0)
    assert_equal_to(theirs, ours, mamba2_pairs(ours, theirs))


@pytest.mark.parametrize("bias", [True, False])
def test_mamba1_is_that_of_transformers(bias: bool) -> None:
    config = MambaConfig(
        hidden_size=H,
        intermediate_size=16,
        state_size=5,
        time_step_rank=3,
        conv_kernel=4,
        expand=2,
        use_bias=bias,
        use_conv_bias=bias,
        num_hidden_layers=1,
    )
    ours = Mamba1(H, Mamba1Sizes(16, 3, 5, 4, chunk_size=4), bias=bias, conv_bias=bias)
    fused = {
        "in_proj.weight": [ours.x.weight, ours.z.weight],
        "conv1d.weight": [ours.conv_x.weight],
        "x_proj.weight": [ours.dt_down.weight, ours.B.weight, ours.C.weight],
        "dt_proj.weight": [ours.dt_up.weight],
        "dt_proj.bias": [ours.dt_bias],
        "A_log": [ours.A_log],
        "D": [ours.D],
        "out_proj.weight": [ours.output.weight],
    }
    if bias:
        fused |= {
            "conv1d.bias": [ours.conv_x.bias],
            "in_proj.bias": [ours.x.bias, ours.z.bias],
            "out_proj.bias": [ours.output.bias],
        }
    assert_equal_to(MambaMixer(config, layer_idx=0), ours, fused)


class ByHead(nn.Module):
    """Qwen3-Next's mixer with its fused projections in the order q, k, v, z; b, a, each over all heads.

    There a key head's q, k and its value heads' v and z stand together.
    """

    def __init__(self, theirs: Qwen3NextGatedDeltaNet) -> None:
        super().__init__()
        self.theirs = theirs
        self.qkvz = nn.Parameter(theirs.in_proj_qkvz.weight.detach().clone())
        self.ba = nn.Parameter(theirs.in_proj_ba.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        n, keys = self.theirs.num_v_heads, self.theirs.num_k_heads
        d, e = self.theirs.head_k_dim, self.theirs.head_v_dim
        parts = self.qkvz.split([keys * d, keys * d, n * e, n * e])
        fused = torch.cat([part.view(keys, -1, H) for part in parts], 1).flatten(0, 1)
        gates = torch.cat([part.view(keys, -1, H) for part in self.ba.split([n, n])], 1).flatten(0, 1)
        weights = {"in_proj_qkvz.weight": fused, "in_proj_ba.weight": gates}
        return torch.func.functional_call(self.theirs, weights, (x,))


def test_the_gated_delta_net_is_that_of_qwen3_next() -> None:
    config = Qwen3NextConfig(
        hidden_size=H,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=5,
        linear_value_head_dim=3,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-4,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    ours = GatedDelta(H, DeltaSizes(4, 2, key_head_dim=5, value_head_dim=3, chunk_size=4), norm_eps=1e-4)
    theirs = ByHead(Qwen3NextGatedDeltaNet(config, layer_idx=0))
    for parameter in theirs.theirs.in_proj_qkvz.weight, theirs.theirs.in_proj_ba.weight:
        parameter.requires_grad_(False)
    fused = {
        "qkvz": [ours.q.weight, ours.k.weight, ours.v.weight, ours.z.weight],
        "ba": [ours.beta.weight, ours.a.weight],
        "theirs.conv1d.weight": [ours.conv_q.weight, ours.conv_k.weight, ours.conv_v.weight],
        "theirs.A_log": [ours.A_log],
        "theirs.dt_bias": [ours.dt_bias],
        "theirs.norm.weight": [ours.norm.weight],
        "theirs.out_proj.weight": [ours.output.weight],
    }
    assert_equal_to(theirs, ours, fused)
