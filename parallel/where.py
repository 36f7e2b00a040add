"""Where the tokens of a micro-batch stand in the run: step, sample, position, document.

Every layer receives it; none derives a position from its rank, so that the same token is the same token
in every layout. Letters: s positions of this rank, b samples of the micro-batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Where:
    """The place of each token of one micro-batch, and what a sum over tokens is divided by."""

    step: int
    sample: Int[Tensor, " b"]
    """Global sample index: a count from the beginning of the run."""
    position: Int[Tensor, " s"]
    """Position in the sample, in the order of this rank's tokens."""
    document: Int[Tensor, "s b"]
    """Document that the token comes from."""
    counted: Bool[Tensor, "s b"]
    """Whether the token's prediction counts in the loss; padding does not."""
    step_tokens: float
    """Counted tokens of the whole step on all ranks: what every sum over tokens is divided by."""
    seq_len: int
    """Tokens of a whole sample, over all ranks that share it."""
    mask_documents: bool = False
    """Whether a token attends only to its own document."""
    derived: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """What layers computed from the rest, such as rotary angles, so that the next layer need not."""
    decisions: dict[str, Any] | None = field(default=None, repr=False, compare=False)
    """What a layer decided in a forward pass that will be recomputed; None where none will be."""

    def derive(self, key: str, compute: Callable[[], T]) -> T:
        """Return what `compute` makes of this place, computing it once for all layers."""
        if key not in self.derived:
            self.derived[key] = compute()
        found: T = self.derived[key]
        return found

    def decide(self, key: str, choose: Callable[[], T]) -> T:
        """Return what `choose` decides; in a recomputed pass what was decided in the first."""
        if self.decisions is None:
            return choose()
        if key not in self.decisions:
            self.decisions[key] = choose()
        decided: T = self.decisions[key]
        return decided

    def remembering(self) -> "Where":
        """Return this place for one call of a layer that will be called with it again."""
        return replace(self, decisions={})


def where_of_plain_tokens(tokens: Int[Tensor, "s b"]) -> Where:
    """Return the place of tokens that come from no run: one step, samples 0 to b-1, every token counted."""
    s, b = tokens.shape
    device = tokens.device
    return Where(
        step=0,
        sample=torch.arange(b, device=device),
        position=torch.arange(s, device=device),
        document=torch.zeros(s, b, dtype=torch.int64, device=device),
        counted=torch.ones(s, b, dtype=torch.bool, device=device),
        step_tokens=float(s * b),
        seq_len=s,
    )
