"""Where the tokens of a micro-batch stand in the run: step, sample, position, document.

Every layer receives it; none derives a position from its rank, so that the same token is the same token in every
layout. A sample lies on cp x tp ranks:

    the whole sample       [s]           every rank knows its documents and how many of its tokens count
    what a mixer sees      [s/cp]        the same on all ranks of tp, which hold other heads
    held between layers    [s/(cp*tp)]   this rank's stretch of it

Letters: s positions of a sample, b samples of the micro-batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from meshwright.kernels.limits import USUAL, Limits
from meshwright.parallel.mesh import NO_TP, Axis

T = TypeVar("T")


@dataclass(frozen=True)
class Where:
    """The place of each token of one micro-batch, and what a sum over tokens is divided by."""

    step: int
    sample: Int[Tensor, " b"]
    """Global sample index: a count from the beginning of the run."""
    position: Int[Tensor, " s_held"]
    """Position in the sample of each token held between layers."""
    position_mixed: Int[Tensor, " s_mixed"]
    """Position of each token that a mixer sees; those held are a stretch of them."""
    counted: Bool[Tensor, "s_held b"]
    """Whether the prediction of a held token counts in the loss; padding does not."""
    document_whole: Int[Tensor, "s b"]
    """Document that each token of the whole sample comes from, by position."""
    sequence_tokens: Int[Tensor, " b"]
    """Counted tokens of each whole sample."""
    step_tokens: float
    """Counted tokens of the whole step on all ranks: what every sum over tokens is divided by."""
    seed: int = 0
    """The run's, for random numbers."""
    mask_documents: bool = False
    """Whether a token attends only to its own document."""
    whole_tokens: tuple[Int[Tensor, "s b"], Int[Tensor, "s b"]] | None = None
    """The whole sample's tokens and targets, where a mixer sees some of them only."""
    lap: int = 0
    """How often these layers were gone through before, where several share their weights: draws of random numbers
    differ."""
    limits: Limits = USUAL
    """How much of this a layer works on at a time."""
    decisions: dict[str, Any] | None = field(default=None, repr=False, compare=False)
    """What a layer decided in a forward pass that will be recomputed; None where none will be."""

    derived: ClassVar[dict[str, Any]]
    """What layers computed from the rest, such as rotary angles, so that the next layer need not; by a key that begins
    with "counted/" where `counted` went into it. Each place has its own, and it is no field: a place that is made of
    another (`dataclasses.replace`) begins with none of it."""

    def __post_init__(self) -> None:
        vars(self)["derived"] = {}  # not a cached property, whose lock torch.compile cannot see through

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

    def refuse_others(self, x: Tensor) -> None:
        """Refuse tokens [s_held, b, h] of which some do not stand here: each would be taken for another.

        Raises:
            ValueError: with both numbers of tokens and of samples.
        """
        here = [len(self.position), len(self.sample)]
        if list(x.shape[:2]) != here:
            raise ValueError(
                f"x = {list(x.shape[:2])} tokens and samples: must be those of where, {here};"
                " where_of_plain_tokens(tokens) makes one of whole samples"
            )

    def of_lap(self, lap: int) -> "Where":
        """Return this place for layers that are used once more."""
        return self._with_derived(replace(self, lap=lap), self.derived) if lap else self

    def counting(self, counted: Bool[Tensor, "s b"]) -> "Where":
        """Return this place where these tokens of the whole samples count in their stead."""
        kept = {key: found for key, found in self.derived.items() if not key.startswith("counted/")}
        return self._with_derived(replace(self, counted=counted[self.position], sequence_tokens=counted.sum(0)), kept)

    def draw_name(self, name: str) -> str:
        """Return the name under which a layer draws random numbers: in each lap another."""
        return f"{name}/lap{self.lap}" if self.lap else name

    def remembering(self) -> "Where":
        """Return this place for one call of a layer that will be called with it again."""
        return self._with_derived(replace(self, decisions={}), self.derived)

    @staticmethod
    def _with_derived(where: "Where", derived: dict[str, Any]) -> "Where":
        vars(where)["derived"] = derived
        return where


def place(
    sample: Int[Tensor, " b"],
    document: Int[Tensor, "s b"],
    counted: Bool[Tensor, "s b"],
    position_mixed: Int[Tensor, " s_mixed"],
    tp: Axis,
    *,
    step: int,
    step_tokens: float,
    **more: Any,
) -> Where:
    """Return the place of a micro-batch of whole samples, of which a mixer of this rank sees `position_mixed`."""
    held = position_mixed.chunk(tp.size)[tp.rank]
    return Where(
        step=step,
        sample=sample,
        position=held,
        position_mixed=position_mixed,
        counted=counted[held],
        document_whole=document,
        sequence_tokens=counted.sum(0),
        step_tokens=step_tokens,
        **more,
    )


def where_of_plain_tokens(tokens: Int[Tensor, "s b"], step: int = 0) -> Where:
    """Return the place of tokens that come from no run: samples 0 to b-1, every token counted.

    What is drawn in training (dropout, noise) is the same for the same `step`: each call is to have another.
    """
    s, b = tokens.shape
    device = tokens.device
    document = torch.zeros(s, b, dtype=torch.int64, device=device)
    counted, position = document == 0, torch.arange(s, device=device)
    sample = torch.arange(b, device=device)
    return place(sample, document, counted, position, NO_TP, step=step, step_tokens=float(s * b))
