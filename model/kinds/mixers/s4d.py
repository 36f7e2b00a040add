"""S4D: its table [model.s4d] and its description (module: mixers/s4d.py).

    A_log, A_imag [h, N/2]   C [h, N/2, 2]   log_dt, D [h]   output, gate [h, h], with biases      N = state_size

Kept for each token, of a rank's h/tp features: h/tp of the normed features, y before and behind GELU; h/tp of the
output and twice of the gate, summed over tp; for each chunk of l tokens the state before it, N/l numbers a feature;
and for any number of samples three tables of powers, N l numbers a feature each, a kernel of l complex numbers and 5N
beside them; and as many again for the last tokens of a sample, if they fill no chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from meshwright.model.kinds.kept import norm_inputs
from meshwright.model.kinds.kind import OVER_TP, Choose, Degrees, Kind, Named, Need, Types, Weight, matrix, vector
from meshwright.model.kinds.sizes import TABLE, Size
from meshwright.model.kinds.small import ALIGNED

if TYPE_CHECKING:
    from meshwright.model.config import ModelConfig
    from meshwright.model.kinds.small import Small

WITHOUT_CP = "convolves whole samples"


class S4dConfig(BaseModel):
    """The S4D mixer that stands at each `S` of the pattern."""

    model_config = TABLE

    state_size: Size = 64
    """Numbers that each feature remembers, as conjugate pairs; must be even, 64 is usual."""
    chunk_size: Size = 64
    """Tokens of a chunk of the convolution: speed and memory, never the result."""
    start: Literal["linear", "real"] = "linear"
    """How the states begin: oscillations of n turns (S4D-Lin) or decays of n + 1 (S4D-Real)."""
    bias: bool = True
    """Give output and gate a bias, as published."""


@dataclass(frozen=True, eq=False)
class S4dKind(Kind):
    """A convolution of each feature with decaying oscillations."""

    def weights(self, model: ModelConfig) -> Named:
        """Yield what there is of each feature, then output and gate."""
        table, h = _table(model), model.hidden_size
        pairs = table.state_size // 2
        yield "A_log", Weight((h, pairs), OVER_TP)
        yield "A_imag", Weight((h, pairs), OVER_TP)
        yield "C", Weight((h, pairs, 2), OVER_TP)
        yield "log_dt", vector(h, OVER_TP)
        yield "D", vector(h, OVER_TP)
        for name in ("output", "gate"):
            yield f"{name}.weight", matrix(h, h, OVER_TP)
            if table.bias:
                yield f"{name}.bias", vector(h)

    def mixing_flops(self, model: ModelConfig, seq_len: int, *, causal: bool) -> float:
        """Return those of the recurrence: a complex product, a sum and the real part of one for each pair."""
        return 5.0 * model.hidden_size * _table(model).state_size

    def kept(self, model: ModelConfig, degrees: Degrees, types: Types) -> float:
        """Return what stands at the head of this file."""
        table, h = _table(model), model.hidden_size / degrees.tp
        states = h * table.state_size / table.chunk_size * types.wide
        between = 2 * h * types.stream + h * types.inputs(2) + 2 * h * types.product
        return norm_inputs(model, self.place, degrees, types) + between + states

    def kept_once(self, model: ModelConfig, length: int, degrees: Degrees, types: Types) -> float:
        """Return the tables of powers for whole chunks, and those for what remains of a sample."""
        size, chunk = _table(model).state_size, _table(model).chunk_size
        lengths = [chunk] * (length >= chunk) + [length % chunk] * (length % chunk > 0)
        numbers = sum(size * (3 * each + 5) + 2 * each for each in lengths)
        return model.hidden_size / degrees.tp * numbers * types.wide

    def state_bytes(self, model: ModelConfig, tokens: int, width: int) -> float:
        """Return the bytes of the state, however many tokens there were."""
        return model.hidden_size * _table(model).state_size * max(4.0, width)

    def problems(self, model: ModelConfig, choose: Choose) -> list[str]:
        """Return what is wrong with the size of the state."""
        size = _table(model).state_size
        if size % 2 == 0:
            return []
        rule = "must be even, because states are conjugate pairs"
        fits = " or ".join(str(other) for other in (size - 1, size + 1) if other)
        return [f"model.s4d.state_size = {size}: {rule}; {fits} would fit"]

    def needs(self, model: ModelConfig) -> list[Need]:
        """Return that tp divides the features."""
        return [Need("tp", "model.hidden_size", model.hidden_size)]

    def narrowed(self, model: ModelConfig, small: Small, above: int) -> dict[str, Any]:
        """Return a small state, and chunks that are shorter than the small sequence."""
        table = _table(model)
        found: dict[str, Any] = {
            "s4d": table.model_copy(
                update={"state_size": min(table.state_size, 6), "chunk_size": min(table.chunk_size, 8)}
            )
        }
        if model.hidden_size % small.needs.tp != 0:
            step = small.needs.tp * ALIGNED
            found["hidden_size"] = step * (max(model.hidden_size, model.ffn_hidden_size) // step + 1)
        return found


def _table(model: ModelConfig) -> S4dConfig:
    assert model.s4d is not None, "the checks see to it that S has its table"
    return model.s4d
