"""Multi-token prediction (DeepSeek-AI 2024, section 2.2): in training each position predicts further tokens too.

    x_0 [s, b, h]   what the last layer gives
    x_k = layer_k( projection_k [ norm(x_{k-1}) ; norm(embedding of the token k places on) ] )
    loss_k          of norm(x_k) against the token k + 1 places on, through the model's output matrix

The mean of the losses, each over the tokens of the step as the main loss is, is added with a weight; the loss that the
model returns is that of the next token alone. A position counts where the token that it is to predict does, and is of
its document where documents are apart; one that does not counts for a router within layer_k neither, and takes its own
token for the one that is not there. In evaluation and generation nothing of this is computed.

Tokens further on may lie on another rank of cp: every rank has whole samples of token ids (`Where.whole_tokens`).
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from meshwright.kernels.matmul.cross_entropy import NOT_COUNTED
from meshwright.model.block import Layer
from meshwright.parallel.collectives import heads_to_sequence
from meshwright.parallel.initialise import InitPolicy
from meshwright.parallel.mesh import NO_TP, Axis
from meshwright.parallel.tally import Tally
from meshwright.parallel.tensor.linear import ColumnLinear, column_products
from meshwright.parallel.where import Where


class Shifted(NamedTuple):
    """The tokens some places on from those that a mixer of this rank sees, the targets there, and whose they are."""

    tokens: Int64[Tensor, "s b"]
    targets: Int64[Tensor, "s b"]
    where: Where
    """The place of the tokens that predict: only those with a target count."""


def shifted(where: Where, tokens: Int64[Tensor, "s b"], targets: Int64[Tensor, "s b"], by: int) -> Shifted:
    """Return what stands `by` places on; `tokens` and `targets` are those here, if samples are whole here.

    Behind the end of a sample, or of a document where they are apart, there is no target.
    """
    whole_tokens, whole_targets = where.whole_tokens or (tokens, targets)
    here = torch.arange(len(whole_tokens), device=whole_tokens.device)
    ahead = (here + by).clamp(max=len(here) - 1)
    is_there = (here + by < len(here))[:, None]
    if where.mask_documents:
        is_there = is_there & (where.document_whole[ahead] == where.document_whole)
    further = torch.where(is_there, whole_tokens[ahead], whole_tokens)
    wanted = torch.where(is_there, whole_targets[ahead], NOT_COUNTED)
    mixed = where.position_mixed
    return Shifted(further[mixed], wanted[mixed], where.counting(wanted != NOT_COUNTED))


class FurtherToken(nn.Module):
    """What one more token is predicted from."""

    def __init__(
        self,
        layer: Layer,
        hidden_size: int,
        *,
        hidden_norm: nn.Module,
        embedding_norm: nn.Module,
        final_norm: nn.Module,
        name: str = "multi_token.0",
        init: InitPolicy | None = None,
        tp: Axis = NO_TP,
    ) -> None:
        """Compose a layer with the norms of what it is given; `name` is what its loss is tallied under."""
        super().__init__()
        self.hidden_norm, self.embedding_norm = hidden_norm, embedding_norm
        rule = (init or InitPolicy()).matrix(2 * hidden_size, hidden_size)
        self.projection = ColumnLinear(2 * hidden_size, hidden_size, rule=rule, tp=tp)
        self.layer, self.final_norm, self.name, self.tp = layer, final_norm, name, tp

    def tally_entries(self) -> dict[str, int]:
        """Declare the loss of this prediction."""
        return {f"{self.name}.loss": 1}

    def forward(
        self,
        x: Float[Tensor, "s_local b h"],
        embedded: Float[Tensor, "s_local b h"],
        where: Where,
        tally: Tally | None,
    ) -> Float[Tensor, "s_local b h"]:
        """Return the vectors that the further tokens are predicted from, before their norm."""
        both = torch.cat([self.hidden_norm(x), self.embedding_norm(embedded)], dim=-1)
        (columns,) = column_products(both, [self.projection], self.tp)
        stream = heads_to_sequence(columns[..., None], self.tp)[..., 0]
        return self.layer(stream.to(x.dtype), where, tally)  # type: ignore[no-any-return]


def beside(embedded: Float[Tensor, "s b h"], x: Float[Tensor, "s b h"]) -> Float[Tensor, "s b h"]:
    """Return `embedded` unchanged, as something that comes of `x` too; no gradient goes there.

    A split backward begins for a weight's gradient where what comes of the weight alone meets what comes of the stage's
    input. If one such place of the embedding lay behind another, as the second further token's behind the first's, the
    graph between them would be gone through twice, and it is freed; beside `x` none lies behind another.
    """
    placed: Tensor = _Beside.apply(embedded, x)  # type: ignore[no-untyped-call]
    return placed


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embedded: Tensor, x: Tensor) -> Tensor:
        return embedded.view_as(embedded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
