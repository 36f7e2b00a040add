"""S4D (Gu et al. 2022): each feature is convolved with a sum of decaying oscillations, then features are mixed.

    x [s/tp, b, h] --exchange--> [s, b, h/tp]             a feature's whole sequence on one rank
    h[t] = exp(dt A) h[t-1] + x[t];  y = 2 Re(C' h) + D x      A = -exp(A_log) + i A_imag, N/2 conjugate pairs a feature
    output(gelu(y)) * sigmoid(gate(gelu(y)))              a gated unit over all features, summed over tp

The convolution is the same for every token: no choice of what to remember, unlike Mamba. It refuses cp. In generation
the state is of constant size.
"""

from dataclasses import dataclass
from math import log, pi
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor, nn

from meshwright.kernels.precision import at_least_fp32
from meshwright.kernels.states.s4d import S4dParameters, s4d
from meshwright.model.config import ModelConfig
from meshwright.model.making import Making
from meshwright.parallel.collectives import sequence_to_heads
from meshwright.parallel.fits import check_known, check_sizes
from meshwright.parallel.initialise import ZEROS, InitPolicy, InitRule
from meshwright.parallel.mesh import NO_CP, NO_TP, Axis
from meshwright.parallel.placement import Placement, Split
from meshwright.parallel.sequence_state import document_begins
from meshwright.parallel.tally import Tally
from meshwright.parallel.tensor.linear import RowLinear, divide
from meshwright.parallel.where import Where

Start = Literal["linear", "real"]


class S4dSizes(NamedTuple):
    """How large the state is, and how it begins."""

    state_size: int = 64
    """Real numbers of a feature's state: N/2 conjugate pairs."""
    chunk_size: int = 64
    start: Start = "linear"
    """`linear` (S4D-Lin): A = -1/2 + i pi n.  `real` (S4D-Real): A = -(n + 1)."""


@dataclass
class S4dState:
    """What generation carries from token to token."""

    state: Complex[Tensor, "b c N"]


class S4d(nn.Module):
    """A causal mixer that convolves each feature."""

    def __init__(
        self,
        hidden_size: int,
        sizes: S4dSizes,
        *,
        bias: bool = True,
        init: InitPolicy | None = None,
        tp: Axis = NO_TP,
        cp: Axis = NO_CP,
    ) -> None:
        """Take global sizes; `bias` gives output and gate one.

        Raises:
            ValueError: if tp does not divide the features, the state has no whole pairs, its start is none that there
                is, or cp is asked for.
        """
        super().__init__()
        if cp.is_split:
            raise ValueError(f"an S4D mixer needs whole samples: cp = {cp.size} is refused; cp = 1 would fit")
        size, self.chunk_size, self.start = sizes
        check_sizes({"hidden_size": hidden_size, "state_size": size, "chunk_size": sizes.chunk_size})
        check_known("start", [self.start], get_args(Start))
        self.tp, init = tp, init or InitPolicy()
        local = divide(hidden_size, tp.size, what="hidden_size", by=tp.name)
        pairs = divide(size, 2, what="state_size", by="the two of a conjugate pair")
        self.A_log, self.A_imag = (nn.Parameter(torch.empty(local, pairs)) for _ in range(2))
        self.C = nn.Parameter(torch.empty(local, pairs, 2))
        self.log_dt, self.D = (nn.Parameter(torch.empty(local)) for _ in range(2))
        outward = init.matrix(hidden_size, hidden_size, to_residual=True)
        self.output = RowLinear(hidden_size, hidden_size, rule=outward, bias=bias, tp=tp)
        gate = init.matrix(hidden_size, hidden_size)
        self.gate = RowLinear(hidden_size, hidden_size, rule=gate, bias=bias, tp=tp)

    def placements(self) -> dict[str, Placement]:
        """Say that each parameter of a feature is cut by feature."""
        return dict.fromkeys(("A_log", "A_imag", "C", "log_dt", "D"), Placement((Split(0, self.tp),)))

    def init_rules(self) -> dict[str, InitRule]:
        """Say how each parameter begins; steps from 0.001 to 0.1, evenly in the logarithm."""
        a_log = InitRule("constant", log(0.5)) if self.start == "linear" else InitRule("log_of_column")
        a_imag = InitRule("column", pi) if self.start == "linear" else ZEROS
        steps = InitRule("between", low=log(0.001), high=log(0.1))
        normal = InitRule("normal", 1.0)
        return {"A_log": a_log, "A_imag": a_imag, "C": InitRule("normal", 0.5**0.5), "log_dt": steps, "D": normal}

    def forward(
        self, x: Float[Tensor, "s_local b h"], where: Where, tally: Tally | None
    ) -> Float[Tensor, "s_local b h"]:
        """Mix each token with those before it in its sample (in its document, where `where` says so)."""
        y, _ = self._convolution(x, document_begins(where, NO_CP), None)
        return self._out(y)

    def initial_state(self, batch: int, max_len: int | None = None) -> S4dState:
        """Return the state before a sample, whose size does not depend on `max_len`."""
        real = at_least_fp32(self.A_log[:0])
        return S4dState(torch.zeros(batch, *self.A_log.shape, dtype=real.dtype.to_complex(), device=real.device))

    def step(self, x: Float[Tensor, "s b h"], state: S4dState) -> Float[Tensor, "s b h"]:
        """Mix the next tokens with all before them, and bring the state up to date."""
        y, state.state = self._convolution(x, None, state.state)
        return self._out(y)

    def _convolution(self, x: Tensor, begins: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
        features = sequence_to_heads(x[..., None], self.tp)[..., 0]
        a = torch.complex(-at_least_fp32(self.A_log).exp(), at_least_fp32(self.A_imag))
        c = torch.view_as_complex(at_least_fp32(self.C).contiguous())
        parameters = S4dParameters(a, c, at_least_fp32(self.log_dt).exp(), at_least_fp32(self.D))
        return s4d(features, parameters, begins=begins, initial_state=state, chunk_size=self.chunk_size)

    def _out(self, y: Tensor) -> Tensor:
        y = F.gelu(y)
        gated: Tensor = self.output(y) * self.gate(y).sigmoid()
        return gated


def make(config: ModelConfig, making: Making) -> S4d:
    """Return S4D as the config has it."""
    table, mesh = config.s4d, making.mesh
    assert table is not None, "the checks see to it that S has its table"
    sizes = S4dSizes(table.state_size, table.chunk_size, table.start)
    return S4d(config.hidden_size, sizes, bias=table.bias, init=making.init, tp=mesh.tp, cp=mesh.cp)
