"""A residual branch around any part, and a layer of two of them.

    Block   x + dropout(part(norm(x)))               pre-norm (Xiong et al. 2020); dropout only in training
    Layer   a mixer's block, then a feed-forward's; either may be missing

A block does not ask what kind of part it holds: a part takes (x, where, tally) for a whole sequence, and
(x, state) for the next tokens.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from meshwright.parallel.dropout import dropout
from meshwright.parallel.tally import Tally
from meshwright.parallel.where import Where

# What [recompute] modules may name, as the names of modules within a layer (parallel/recompute/policy.py).
RECOMPUTED_WHOLE = {
    "mixer": ("mixer.part",),
    "feedforward": ("feedforward.part",),
    "experts": ("feedforward.part.experts",),
}
RUN_AGAIN = {
    "norm": ("mixer.norm", "feedforward.norm"),
    "activation": tuple(f"feedforward.part.{of}activation" for of in ("", "shared.", "experts.")),
}


class Block(nn.Module):
    """One part with its norm and its residual connection."""

    def __init__(self, norm: nn.Module, part: nn.Module, *, residual_dropout: float = 0.0, name: str = "block") -> None:
        """Compose a norm and a part of the same width; `name`, the global one, is what dropout draws by."""
        super().__init__()
        self.norm, self.part = norm, part
        self.residual_dropout, self.name = residual_dropout, name

    def forward(self, x: Float[Tensor, "s b h"], where: Where, tally: Tally | None) -> Float[Tensor, "s b h"]:
        """Add the part's result, computed from the normalised input, to the input."""
        branch: Tensor = self.part(self.norm(x), where, tally)
        if self.training and self.residual_dropout:
            branch = dropout(branch, self.residual_dropout, where=where, name=f"{self.name}/residual_dropout")
        return x + branch

    def initial_state(self, batch: int, max_len: int) -> Any:
        """Return the part's state before the first token."""
        return self.part.initial_state(batch, max_len)  # type: ignore[operator]

    def step(self, x: Float[Tensor, "s b h"], state: Any) -> Float[Tensor, "s b h"]:
        """Compute the next tokens from the part's state."""
        return x + self.part.step(self.norm(x), state)  # type: ignore[operator, no-any-return]


class Layer(nn.Module):
    """A mixer and the feed-forward that follows it, each in its block."""

    def __init__(self, mixer: Block | None, feedforward: Block | None) -> None:
        """Compose the blocks that the pattern has here."""
        super().__init__()
        self.mixer, self.feedforward = mixer, feedforward

    @property
    def blocks(self) -> list[Block]:
        """Return the blocks that are there, in order."""
        return [block for block in (self.mixer, self.feedforward) if block is not None]

    def forward(self, x: Float[Tensor, "s b h"], where: Where, tally: Tally | None) -> Float[Tensor, "s b h"]:
        """Run the blocks in order."""
        for block in self.blocks:
            x = block(x, where, tally)
        return x

    def initial_state(self, batch: int, max_len: int) -> list[Any]:
        """Return each block's state before the first token."""
        return [block.initial_state(batch, max_len) for block in self.blocks]

    def step(self, x: Float[Tensor, "s b h"], state: list[Any]) -> Float[Tensor, "s b h"]:
        """Compute the next tokens."""
        for block, block_state in zip(self.blocks, state, strict=True):
            x = block.step(x, block_state)
        return x
