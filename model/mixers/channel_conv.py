"""The short causal convolution before a recurrence: k weights for each channel, then silu.

A rank of tp has the channels of its heads; where several ranks use one group of B and C, each holds a copy.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from meshwright.kernels.states.conv import causal_conv, next_conv, tail
from meshwright.parallel.initialise import InitRule
from meshwright.parallel.mesh import NO_TP, Axis
from meshwright.parallel.placement import Placement, Split, partial_over
from meshwright.parallel.tensor.linear import NO_COPIES, divide


class ChannelConv(nn.Module):
    """silu(bias + the last k tokens, weighted by channel); k = `conv_kernel`."""

    def __init__(
        self,
        channels: int,
        conv_kernel: int,
        *,
        bias: bool,
        tp: Axis = NO_TP,
        copies: Axis = NO_COPIES,
    ) -> None:
        """Take the global number of channels; `copies` are the neighbouring ranks of `tp` that hold the same ones."""
        super().__init__()
        self.placement = Placement((Split(0, tp, copies=copies.size),), grad_sum=partial_over(copies))
        local = divide(channels, tp.size // copies.size, what="channels", by=f"{tp.name} / copies")
        self.weight = nn.Parameter(torch.empty(local, conv_kernel))
        self.bias = nn.Parameter(torch.empty(local)) if bias else None

    def placements(self) -> dict[str, Placement]:
        """Say that weight and bias are cut by channel."""
        return {"weight": self.placement, "bias": self.placement}

    def init_rules(self) -> dict[str, InitRule]:
        """Say how each parameter begins: as torch's Conv1d does."""
        rule = InitRule("uniform", self.weight.shape[1] ** -0.5)
        return {"weight": rule} | ({"bias": rule} if self.bias is not None else {})

    def forward(
        self,
        x: Float[Tensor, "s b c"],
        halo: Float[Tensor, "k_less_one b c"] | None = None,
        begins: Bool[Tensor, "s b"] | None = None,
    ) -> Float[Tensor, "s b c"]:
        """Convolve; `halo` are the tokens before, `begins` the starts of documents."""
        y: Tensor = causal_conv(x, self.weight, self.bias, halo=halo, begins=begins)
        return y

    def step(
        self, x: Float[Tensor, "s b c"], halo: Float[Tensor, "k_less_one b c"]
    ) -> tuple[Float[Tensor, "s b c"], Float[Tensor, "k_less_one b c"]]:
        """Convolve the next tokens; return the halo of those after them too."""
        if x.shape[0] == 1:
            return next_conv(x, self.weight, self.bias, halo)
        return self(x, halo), tail(x, halo)

    def empty_halo(self, batch: int) -> Float[Tensor, "k_less_one b c"]:
        """Return the tokens before a sample: zeros."""
        return self.weight.new_zeros(self.weight.shape[1] - 1, batch, self.weight.shape[0])
