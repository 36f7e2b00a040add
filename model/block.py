"""A residual branch around any part, and a layer of two of them.

    Block   stream + branch     branch = part(x), normalised before or behind, or the sum is: `Form` (kinds/norms.py)
    Layer   a mixer's block, then a feed-forward's; either may be missing

In training dropout is on the branch. A block does not ask what kind of part it holds: a part takes (x, where, tally)
for a whole sequence, and (x, state) for the next tokens.
"""

from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from meshwright.model.kinds.norms import PRE, Form
from meshwright.model.norms import refuse_conditioned
from meshwright.parallel.dropout import dropout
from meshwright.parallel.fits import check_finite, check_share
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


class Multipliers(NamedTuple):
    """What a block multiplies by: what goes on in the stream (DeepNorm), and what the part adds to it (Granite)."""

    stream: float = 1.0
    branch: float = 1.0


class Block(nn.Module):
    """One part with its norms and its residual connection."""

    def __init__(
        self,
        part: nn.Module,
        *,
        norm: nn.Module | None = None,
        post_norm: nn.Module | None = None,
        form: Form = PRE,
        multipliers: Multipliers = Multipliers(),  # noqa: B008
        residual_dropout: float = 0.0,
        name: str = "block",
    ) -> None:
        """Compose a part with the norms that `form` has, of the same width.

        `name`, the global one, is what dropout draws by.

        Raises:
            ValueError: if a norm is missing that the form has, there that it has not, or asks for a condition; or if
                dropout is no share, or a multiplier no number.
        """
        super().__init__()
        norms = {key: each for key, each in (("norm", norm), ("post_norm", post_norm)) if each is not None}
        if tuple(norms) != form.names:
            raise ValueError(f"a block of {form} has the norms {list(form.names)}, not {list(norms)}")
        refuse_conditioned(norms, "a block")
        check_share("residual_dropout", residual_dropout)
        check_finite({f"multipliers.{name}": value for name, value in multipliers._asdict().items()}, usual=1.0)
        self.norm, self.part, self.post_norm = norm, part, post_norm
        self.form, self.multipliers = form, multipliers
        self.residual_dropout, self.name = residual_dropout, name

    def forward(self, x: Float[Tensor, "s b h"], where: Where, tally: Tally | None) -> Float[Tensor, "s b h"]:
        """Add the part's result to its input."""
        taken = x if self.norm is None else self.norm(x)
        branch = self._normed_branch(self.part(taken, where, tally))
        if self.training and self.residual_dropout:
            branch = dropout(branch, self.residual_dropout, where=where, name=f"{self.name}/residual_dropout")
        return self._sum(taken if self.form.carries_normed else x, branch)

    def initial_state(self, batch: int, max_len: int | None = None) -> Any:
        """Return the part's state before the first token."""
        return self.part.initial_state(batch, max_len)  # type: ignore[operator]

    def step(self, x: Float[Tensor, "s b h"], state: Any) -> Float[Tensor, "s b h"]:
        """Compute the next tokens from the part's state."""
        taken = x if self.norm is None else self.norm(x)
        branch = self._normed_branch(self.part.step(taken, state))  # type: ignore[operator]
        return self._sum(taken if self.form.carries_normed else x, branch)

    def _normed_branch(self, branch: Tensor) -> Tensor:
        if self.form.after_branch and self.post_norm is not None:
            branch = self.post_norm(branch)
        return branch

    def _sum(self, stream: Tensor, branch: Tensor) -> Tensor:
        if self.multipliers.branch != 1.0:
            branch = branch * self.multipliers.branch
        if self.multipliers.stream != 1.0:
            stream = stream * self.multipliers.stream
        total = stream + branch
        if self.form.after_sum and self.post_norm is not None:
            total = self.post_norm(total)
        return total


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

    def initial_state(self, batch: int, max_len: int | None = None) -> list[Any]:
        """Return each block's state before the first token."""
        return [block.initial_state(batch, max_len) for block in self.blocks]

    def step(self, x: Float[Tensor, "s b h"], state: list[Any]) -> Float[Tensor, "s b h"]:
        """Compute the next tokens."""
        for block, block_state in zip(self.blocks, state, strict=True):
            x = block.step(x, block_state)
        return x
