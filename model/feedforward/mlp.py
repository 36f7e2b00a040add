"""The gated feed-forward: SwiGLU (Shazeer 2020), down(silu(gate x) * up x).

x [s/tp, b, h] --gather--> [s, b, h] --gate, up--> [s, b, f/tp] --down, sum--> [s/tp, b, h]
"""

from jaxtyping import Float
from torch import Tensor, nn

from meshwright.kernels.swiglu import swiglu
from meshwright.parallel.initialise import InitPolicy
from meshwright.parallel.mesh import NO_TP, Axis
from meshwright.parallel.tally import Tally
from meshwright.parallel.tensor.linear import ColumnLinear, RowLinear, column_products
from meshwright.parallel.where import Where


class SwiGlu(nn.Module):
    """The gated unit as a module, so that its result, which is cheap to make again, need not be kept."""

    def forward(self, gate: Float[Tensor, "*tokens f"], up: Float[Tensor, "*tokens f"]) -> Float[Tensor, "*tokens f"]:
        """Return silu(gate) * up."""
        return swiglu(gate, up)


class Mlp(nn.Module):
    """A SwiGLU feed-forward of inner width `ffn_hidden_size`."""

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        *,
        bias: bool = False,
        init: InitPolicy | None = None,
        tp: Axis = NO_TP,
    ) -> None:
        """Take global sizes; `bias` gives all three products one."""
        super().__init__()
        self.tp, init = tp, init or InitPolicy()
        inward = init.matrix(hidden_size, ffn_hidden_size)
        self.gate = ColumnLinear(hidden_size, ffn_hidden_size, rule=inward, bias=bias, tp=tp)
        self.up = ColumnLinear(hidden_size, ffn_hidden_size, rule=inward, bias=bias, tp=tp)
        self.activation = SwiGlu()
        outward = init.matrix(ffn_hidden_size, hidden_size, to_residual=True)
        self.down = RowLinear(ffn_hidden_size, hidden_size, rule=outward, bias=bias, tp=tp)

    def forward(
        self, x: Float[Tensor, "*tokens h"], where: Where | None = None, tally: Tally | None = None
    ) -> Float[Tensor, "*tokens h"]:
        """Compute each token by itself."""
        gate, up = column_products(x, (self.gate, self.up), self.tp)
        return self.down(self.activation(gate, up))  # type: ignore[no-any-return]

    def initial_state(self, batch: int, max_len: int) -> None:
        """Return nothing: tokens do not see each other here."""

    def step(self, x: Float[Tensor, "s b h"], state: None) -> Float[Tensor, "s b h"]:
        """Compute the next tokens."""
        return self.forward(x)
