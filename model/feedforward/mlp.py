"""The gated feed-forward: SwiGLU (Shazeer 2020), down(silu(gate x) * up x)."""

from jaxtyping import Float
from torch import Tensor, nn

from meshwright.kernels.swiglu import swiglu
from meshwright.parallel.initialise import InitPolicy
from meshwright.parallel.linear import Linear
from meshwright.parallel.tally import Tally
from meshwright.parallel.where import Where


class Mlp(nn.Module):
    """A SwiGLU feed-forward of inner width `ffn_hidden_size`."""

    def __init__(
        self, hidden_size: int, ffn_hidden_size: int, *, bias: bool = False, init: InitPolicy | None = None
    ) -> None:
        """Take global sizes; `bias` gives all three products one."""
        super().__init__()
        init = init or InitPolicy()
        inward = init.matrix(hidden_size, ffn_hidden_size)
        self.gate = Linear(hidden_size, ffn_hidden_size, rule=inward, bias=bias)
        self.up = Linear(hidden_size, ffn_hidden_size, rule=inward, bias=bias)
        outward = init.matrix(ffn_hidden_size, hidden_size, to_residual=True)
        self.down = Linear(ffn_hidden_size, hidden_size, rule=outward, bias=bias)

    def forward(
        self, x: Float[Tensor, "*tokens h"], where: Where | None = None, tally: Tally | None = None
    ) -> Float[Tensor, "*tokens h"]:
        """Compute each token by itself."""
        return self.down(swiglu(self.gate(x), self.up(x)))  # type: ignore[no-any-return]

    def initial_state(self, batch: int, max_len: int) -> None:
        """Return nothing: tokens do not see each other here."""

    def step(self, x: Float[Tensor, "s b h"], state: None) -> Float[Tensor, "s b h"]:
        """Compute the next tokens."""
        return self.forward(x)
