"""The dense feed-forward: two or three products with a unit between them (kernels/activations.py).

    gated   x [s/tp, b, h] --gather--> [s, b, h] --gate, up--> f(gate) * up [s, b, f/tp] --down, sum--> [s/tp, b, h]
    plain   x [s/tp, b, h] --gather--> [s, b, h] --up--------> f(up)        [s, b, f/tp] --down, sum--> [s/tp, b, h]

A plain unit has no `gate`. Dropout, in training, is of what stands between (as in T5), drawn by token and feature.
"""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from meshwright.kernels.activations import gated_unit, plain_unit, unit_of
from meshwright.model.config import ModelConfig
from meshwright.model.making import Making
from meshwright.parallel.dropout import dropout
from meshwright.parallel.fits import check_share, check_sizes
from meshwright.parallel.initialise import InitPolicy
from meshwright.parallel.mesh import NO_TP, Axis
from meshwright.parallel.tally import Tally
from meshwright.parallel.tensor.linear import ColumnLinear, RowLinear, column_products
from meshwright.parallel.where import Where


class Inner(NamedTuple):
    """What a feed-forward, or each expert, is beside its sizes."""

    activation: str = "swiglu"
    bias: bool = False
    """Whether every product has one."""
    dropout: float = 0.0
    """Of what stands between the products, in training."""


SWIGLU = Inner()


class Activation(nn.Module):
    """The unit as a module, so that its result, which is cheap to make again, need not be kept."""

    def __init__(self, name: str) -> None:
        """Take a name in `ACTIVATIONS`.

        Raises:
            ValueError: if there is no such name.
        """
        super().__init__()
        self.name, self.is_gated = name, unit_of(name).is_gated

    def forward(
        self, x: Float[Tensor, "*tokens f"], up: Float[Tensor, "*tokens f"] | None = None
    ) -> Float[Tensor, "*tokens f"]:
        """Return f(x), times `up` if the unit is gated."""
        return plain_unit(x, self.name) if up is None else gated_unit(x, up, self.name)


class Mlp(nn.Module):
    """A feed-forward of inner width `ffn_hidden_size`."""

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        inner: Inner = SWIGLU,
        *,
        name: str = "mlp",
        init: InitPolicy | None = None,
        tp: Axis = NO_TP,
    ) -> None:
        """Take global sizes; `name`, the global one, is what dropout draws by.

        Raises:
            ValueError: if a size is 0, the activation is none, or dropout is no share.
        """
        super().__init__()
        check_sizes({"hidden_size": hidden_size, "ffn_hidden_size": ffn_hidden_size})
        check_share("dropout", inner.dropout)
        self.tp, init = tp, init or InitPolicy()
        self.name, self.inner = name, inner
        inward, bias = init.matrix(hidden_size, ffn_hidden_size, is_value=True), inner.bias
        self.activation = Activation(inner.activation)
        if self.activation.is_gated:
            self.gate = ColumnLinear(hidden_size, ffn_hidden_size, rule=inward, bias=bias, tp=tp)
        self.up = ColumnLinear(hidden_size, ffn_hidden_size, rule=inward, bias=bias, tp=tp)
        outward = init.matrix(ffn_hidden_size, hidden_size, to_residual=True)
        self.down = RowLinear(ffn_hidden_size, hidden_size, rule=outward, bias=bias, tp=tp)

    def forward(
        self, x: Float[Tensor, "*tokens h"], where: Where | None = None, tally: Tally | None = None
    ) -> Float[Tensor, "*tokens h"]:
        """Compute each token by itself.

        Raises:
            ValueError: if dropout is to be drawn and nobody says for which tokens.
        """
        inner = self._inner(x)
        if self.training and self.inner.dropout:
            if where is None:
                raise ValueError("dropout is drawn by the tokens' place: give `where`, or call eval() or step()")
            first = self.tp.rank * inner.shape[2]
            name, position = f"{self.name}/dropout", where.position_mixed
            inner = dropout(inner, self.inner.dropout, where=where, name=name, position=position, first_feature=first)
        return self.down(inner)  # type: ignore[no-any-return]

    def initial_state(self, batch: int, max_len: int | None = None) -> None:
        """Return nothing: tokens do not see each other here."""

    def step(self, x: Float[Tensor, "*tokens h"], state: None) -> Float[Tensor, "*tokens h"]:
        """Compute the next tokens."""
        return self.down(self._inner(x))  # type: ignore[no-any-return]

    def _inner(self, x: Tensor) -> Tensor:
        columns = (self.gate, self.up) if self.activation.is_gated else (self.up,)
        inner: Tensor = self.activation(*column_products(x, columns, self.tp))
        return inner


def make(config: ModelConfig, making: Making) -> Mlp:
    """Return the dense feed-forward."""
    name = f"{making.layer}.feedforward"
    inner = Inner(config.ffn_activation, "ffn" in config.bias, config.ffn_dropout)
    return Mlp(config.hidden_size, config.ffn_hidden_size, inner, name=name, init=making.init, tp=making.mesh.tp)
