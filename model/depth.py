"""Mixture-of-Depths (Raposo et al. 2024): a layer that only some tokens of a sequence go through.

    score   r [s, b] = x w, in at least fp32      chosen: the `capacity` share of a sequence's counted tokens
                                                  that score highest; ties go to the earlier token
    y = x + g * (layer(x chosen) - x chosen)      for the chosen, g = r or sigmoid(r)
    y = x                                         for the others

    position  0  1  2  3  4  5  6  7              the layer sees a sequence of four tokens at positions 1, 2, 3 and 6:
    chosen       1  2  3        6                 its mixer mixes these alone, turned by these positions

Whether a token is among the highest depends on later ones. So a predictor, a small MLP on the token (its gradient
stays out of the stream), learns with binary cross entropy to tell; in evaluation and in decoding it decides, and each
sample's state holds its chosen tokens only.

Every sample is a call of the layer by itself, with a `Where` of its own: which tokens are chosen differs between the
samples, and positions and documents with them. Over cp and tp the chosen are cut anew like a sequence
(parallel/sequence_order.py). The layer sees equally many rows of each sequence; those behind a sequence's last
chosen are zeros, of a document of their own, behind all positions and not counted, so that in a causal layer nothing
depends on how many there are.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from meshwright.kernels.precision import at_least_fp32
from meshwright.model.block import Block, Layer
from meshwright.model.config import ModelConfig
from meshwright.model.kinds.depth import depth_of
from meshwright.model.making import Making
from meshwright.model.routers.capacity import capacity_of, first_tokens
from meshwright.model.routing_record import RoutingRecord, empty_record
from meshwright.parallel.context.order import zigzag_part
from meshwright.parallel.fits import check_known, check_not_below_zero, check_sizes
from meshwright.parallel.initialise import InitPolicy, InitRule
from meshwright.parallel.mesh import NO_CP, NO_TP, Axis
from meshwright.parallel.placement import Placement, partial_over
from meshwright.parallel.sequence_order import Order, order_of, recut, rows_in_parts, whole_sequences
from meshwright.parallel.tally import Tally, attach_loss
from meshwright.parallel.where import Where


class Depth(NamedTuple):
    """Which tokens go through, and how."""

    capacity: float = 0.125
    """The share of a sequence's tokens that is chosen; 0.125 in the paper."""
    gate: Literal["score", "sigmoid"] = "score"
    """What the layer's result is multiplied by."""
    predictor_size: int = 32
    """Inner width of the predictor."""
    predictor_weight: float = 0.01
    """Weight of its loss."""


USUAL_DEPTH = Depth()


class SampleAxes(NamedTuple):
    """The axes over which a sample's tokens lie."""

    cp: Axis = NO_CP
    tp: Axis = NO_TP
    token: Axis = Axis("token")
    """cp and tp together."""


class TokenScore(nn.Module):
    """One number for each token: x w, or of an MLP if `inner` is not 0."""

    def __init__(self, hidden_size: int, inner: int = 0, *, init: InitPolicy, tp: Axis) -> None:
        """Take the width; each rank of `tp` sees other tokens."""
        super().__init__()
        self.tp, width = tp, inner or hidden_size
        self.rules = {"weight": init.matrix(width, 1)} | ({"inward": init.matrix(hidden_size, inner)} if inner else {})
        self.inward = nn.Parameter(torch.empty(inner, hidden_size)) if inner else None
        self.weight = nn.Parameter(torch.empty(1, width))

    def placements(self) -> dict[str, Placement]:
        """Say that the weights are whole, and their gradients sums of the ranks'."""
        return dict.fromkeys(self.rules, Placement(grad_sum=partial_over(self.tp)))

    def init_rules(self) -> dict[str, InitRule]:
        """Say how each parameter begins."""
        return self.rules

    def forward(self, x: Float[Tensor, "s b h"]) -> Float[Tensor, "s b"]:
        """Return the numbers, in at least fp32."""
        with torch.autocast(x.device.type, enabled=False):
            x = at_least_fp32(x)
            if self.inward is not None:
                x = F.silu(x @ at_least_fp32(self.inward).T)
            return (x @ at_least_fp32(self.weight).T)[..., 0]


@dataclass
class DepthState:
    """What decoding carries: the layer's state of each sample's chosen tokens, and which those were."""

    of_sample: list[Any]
    routing: RoutingRecord
    """Of all tokens; one choice each, 0 or none, and its score."""


class MixtureOfDepths(Layer):
    """A layer around which a router lets only some tokens in."""

    def __init__(
        self,
        mixer: Block | None,
        feedforward: Block | None,
        hidden_size: int,
        depth: Depth = USUAL_DEPTH,
        *,
        name: str = "layer",
        init: InitPolicy | None = None,
        axes: SampleAxes | None = None,
    ) -> None:
        """Compose the layer's blocks as `Layer` does; `name` is the layer's global one, for the tally.

        Raises:
            ValueError: if the share of tokens is none, or the gate or the predictor cannot be.
        """
        super().__init__(mixer, feedforward)
        check_known("gate", [depth.gate], ("score", "sigmoid"))
        check_sizes(
            {"hidden_size": hidden_size, "predictor_size": depth.predictor_size}, may_be_none=["predictor_size"]
        )
        check_not_below_zero("predictor_weight", depth.predictor_weight)
        if not 0.0 < depth.capacity <= 1.0:
            raise ValueError(f"capacity = {depth.capacity} must be above 0 and at most 1; 0.125 is usual")
        self.depth, self.name, self.axes = depth, name, axes or SampleAxes()
        init, tp = init or InitPolicy(), self.axes.tp
        self.router = TokenScore(hidden_size, init=init, tp=tp)
        self.predictor = TokenScore(hidden_size, depth.predictor_size, init=init, tp=tp)

    def tally_entries(self) -> dict[str, int]:
        """Declare the predictor's loss, how often it was right, and how many tokens went through, of how many."""
        return dict.fromkeys((f"{self.name}.depth_{what}" for what in ("predictor", "right", "chosen", "tokens")), 1)

    def forward(self, x: Float[Tensor, "s b h"], where: Where, tally: Tally | None) -> Float[Tensor, "s b h"]:
        """Let the chosen tokens through, each sample's by themselves, and the others pass by.

        Without a tally the predictor has no loss and learns nothing.
        """
        wide = at_least_fp32(x)  # once for both, which keep it
        score, predicted = self.router(wide), self.predictor(wide.detach())
        order = order_of(where, self.axes.token)
        chosen = where.decide(f"depth/{id(self)}", lambda: self.choose(score, predicted, where, order))
        if self.training and tally is not None:
            x = self._attach_loss(x, predicted, chosen[order.held], where, tally)
        most = self._rows(chosen)
        cut = recut(chosen, most, order, self.axes.cp, self.axes.token)
        places = self._places(chosen, most, where, order)
        inner = cut.bring(x)
        pieces = [super(MixtureOfDepths, self).forward(inner[:, i : i + 1], at, tally) for i, at in enumerate(places)]
        added = cut.bring_back(torch.cat(pieces, dim=1) - inner)
        return x + self._gate(score, added) * added

    def initial_state(self, batch: int, max_len: int | None = None) -> DepthState:  # type: ignore[override]
        """Return the layer's state before the first token, for each sample by itself."""
        of_sample = [super(MixtureOfDepths, self).initial_state(1, max_len) for _ in range(batch)]
        return DepthState(of_sample, empty_record(batch, max_len, (1,), self.router.weight))

    def step(self, x: Float[Tensor, "s b h"], state: DepthState) -> Float[Tensor, "s b h"]:  # type: ignore[override]
        """Let those of the next tokens through that the predictor takes for chosen."""
        begin = state.routing.length
        score, goes = self._decided(x, state.routing)
        added = torch.zeros_like(x)
        for i, of_sample in enumerate(state.of_sample):
            at = goes[:, i].nonzero()[:, 0]
            if len(at):
                _stand_at(of_sample, at + begin)
                some = x[at, i : i + 1]
                added[at, i : i + 1] = super().step(some, of_sample) - some
        return x + self._gate(score, added) * added

    def _decided(self, x: Tensor, routing: RoutingRecord) -> tuple[Float[Tensor, "s b"], Bool[Tensor, "s b"]]:
        """Return the scores of the next tokens and which go through: as recorded, or decided now and recorded."""
        if routing.is_replayed:
            again = routing.again(x)
            goes = torch.ones_like(again.expert, dtype=torch.bool) if again.taken is None else again.taken
            return again.weight[..., 0], goes[..., 0]
        score, goes = self.router(x), self.predictor(x) > 0
        routing.add(torch.zeros_like(goes[..., None], dtype=torch.int32), score[..., None], goes[..., None])
        return score, goes

    def _gate(self, score: Tensor, like: Tensor) -> Tensor:
        gate = score if self.depth.gate == "score" else score.sigmoid()
        return gate.to(like.dtype)[..., None]

    def choose(self, score: Tensor, predicted: Tensor, where: Where, order: Order) -> Bool[Tensor, "s b"]:
        """Return, by position, which tokens of whole sequences go through."""
        if not self.training:
            return whole_sequences(predicted, where, self.axes.token) > 0
        number = capacity_of(where.sequence_tokens, self.depth.capacity, 1, 1)
        return first_tokens(whole_sequences(score, where, self.axes.token), order.counted, number)

    def _rows(self, chosen: Tensor) -> int:
        """Return how many rows the layer sees of each sequence: in training the same for all of a length."""
        if self.training:
            s = torch.tensor([len(chosen)])
            most = int(capacity_of(s, self.depth.capacity, 1, 1))
        else:
            most = int(chosen.sum(0).max())
        return rows_in_parts(most, self.axes.cp, self.axes.tp)

    def _places(self, chosen: Tensor, rows: int, where: Where, order: Order) -> list[Where]:
        """Return the place of each sample's chosen tokens, as the layer sees them."""
        b, cp, tp = chosen.shape[1], self.axes.cp, self.axes.tp
        if rows > len(chosen):
            chosen = F.pad(chosen, (0, 0, 0, rows - len(chosen)))
        first = (~chosen).to(torch.int8).argsort(dim=0, stable=True)[:rows]
        is_chosen = chosen.gather(0, first)
        at = first.clamp(max=len(order.position) - 1)
        behind = order.position[-1] + 1 + torch.arange(rows, device=at.device)
        position = torch.where(is_chosen, order.position[at], behind[:, None])
        document = where.document_whole.gather(0, at).where(is_chosen, where.document_whole.max() + 1)
        counted = order.counted.gather(0, at) & is_chosen
        mixed = zigzag_part(torch.arange(rows, device=at.device), cp)
        held = mixed.chunk(tp.size)[tp.rank]
        decisions: list[dict[str, Any]] = where.decide(f"depth/{id(self)}/inner", lambda: [{} for _ in range(b)])
        return [
            replace(
                where,
                sample=where.sample[i : i + 1],
                position=position[held, i],
                position_mixed=position[mixed, i],
                counted=counted[held, i : i + 1],
                document_whole=document[:, i : i + 1],
                sequence_tokens=counted[:, i : i + 1].sum(0),
                whole_tokens=None,  # of all samples, and of no use within a layer
                decisions=None if where.decisions is None else decisions[i],
            )
            for i in range(b)
        ]

    def _attach_loss(self, x: Tensor, predicted: Tensor, chosen: Tensor, where: Where, tally: Tally) -> Tensor:
        counted, target = where.counted, chosen.to(predicted.dtype)
        losses = F.binary_cross_entropy_with_logits(predicted, target, reduction="none")
        loss = (losses * counted).sum() / where.step_tokens
        tally.add(f"{self.name}.depth_predictor", loss)
        tally.add(f"{self.name}.depth_right", (((predicted > 0) == chosen) & counted).sum())
        tally.add(f"{self.name}.depth_chosen", (chosen & counted).sum())
        tally.add(f"{self.name}.depth_tokens", counted.sum())
        return attach_loss(x, loss * self.depth.predictor_weight)


def _stand_at(state: Any, position: Tensor) -> None:
    """Tell each part's state where the next tokens stand, if it asks: they need not follow on the last."""
    for of_block in state:
        if hasattr(of_block, "at"):
            of_block.at = position


def routed_layer(
    mixer: Block | None, feedforward: Block | None, config: ModelConfig, making: Making
) -> MixtureOfDepths:
    """Return a layer of the model's that only some tokens go through."""
    table, mesh = depth_of(config), making.mesh
    depth = Depth(table.capacity, table.gate, table.predictor_size, table.predictor_weight)
    axes = SampleAxes(mesh.cp, mesh.tp, mesh.token)
    return MixtureOfDepths(
        mixer, feedforward, config.hidden_size, depth, name=making.layer, init=making.init, axes=axes
    )
