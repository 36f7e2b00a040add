"""One stage of a pipeline: some layers in a row, with the embedding before the first and the loss after the last.

    stage 0          tokens --embedding--> layers --> activations [s, b, h]
    between          activations          --> layers --> activations
    the last         activations          --> layers --> norm, output --> this rank's share of the loss [1]

What travels between stages is the activations and nothing else. Tokens, targets and `Where` of a step's micro-batches
are on every rank already; a stage is told them before the step, and finds one by the number that comes with each call.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from meshwright.model.stack import LanguageModel
from meshwright.parallel.tally import Tally
from meshwright.parallel.where import Where


@dataclass(frozen=True)
class HeldStages:
    """The stages that one rank holds, by number, with the layers of each, and how many stages there are in all."""

    layers_of: Mapping[int, range]
    count: int

    @property
    def layers(self) -> tuple[int, ...]:
        """Return the numbers of the layers that the rank holds."""
        return tuple(number for layers in self.layers_of.values() for number in layers)

    @property
    def has_first(self) -> bool:
        """Say whether the rank holds the stage with the embedding."""
        return 0 in self.layers_of

    @property
    def has_last(self) -> bool:
        """Say whether the rank holds the stage with the output."""
        return self.count - 1 in self.layers_of


@dataclass(frozen=True)
class MicroBatch:
    """What every stage knows of a micro-batch."""

    tokens: Int64[Tensor, "s b"]
    targets: Int64[Tensor, "s b"]
    where: Where


class StagePart(nn.Module):
    """The layers of one stage; the model keeps them too, under their global names."""

    def __init__(self, model: LanguageModel, layers: range, *, is_first: bool, is_last: bool) -> None:
        """Take the stage's layers, by number, and say which ends of the model are its own."""
        super().__init__()
        self.is_first, self.is_last = is_first, is_last
        self.layers = nn.ModuleList(model.layers[str(number)] for number in layers)
        # Registered, so that who asks for the stage's parameters finds them; a tied embedding belongs to both ends.
        self.embedding = model.embedding if is_first or is_last else None
        self.positions, self.embedding_norm = (model.positions, model.embedding_norm) if is_first else (None, None)
        self.multi_token = model.multi_token if is_last else None
        self.final_norm, self.output = (model.final_norm, model.output) if is_last else (None, None)
        self._whole = (model,)  # in a tuple, so that the model does not become a module of its own part
        self._micro_batches: Sequence[MicroBatch] = ()
        self._tally: Tally | None = None
        self._autocast: tuple[str, torch.dtype] | None = None

    def start_step(
        self, micro_batches: Sequence[MicroBatch], tally: Tally | None, autocast: tuple[str, torch.dtype] | None = None
    ) -> None:
        """Take what the next calls are about; `autocast` is the device and type of products, where it is not theirs."""
        self._micro_batches, self._tally, self._autocast = micro_batches, tally, autocast

    def forward(self, *activations: Tensor, number: Int64[Tensor, "1"]) -> Tensor:
        """Run one micro-batch through the stage: on from `activations`, in the first stage from its tokens."""
        micro_batch = self._micro_batches[int(number)]
        if self._autocast is None:
            return self._run(micro_batch, *activations)
        device, dtype = self._autocast
        with torch.autocast(device, dtype):
            return self._run(micro_batch, *activations)

    def _run(self, micro_batch: MicroBatch, *activations: Tensor) -> Tensor:
        model = self._whole[0]
        x: Any = model.begin(micro_batch.tokens, micro_batch.where) if self.is_first else activations[0]
        for layer in self.layers:
            x = layer(x, micro_batch.where, self._tally)
        where = micro_batch.where
        # No view: FSDP2 hooks what a module returns, and torch detaches a stage's output in place.
        if self.is_last:
            x = torch.stack([model.loss(x, micro_batch.tokens, micro_batch.targets, where, self._tally)])
        result: Tensor = x
        return result


def stage_parts(model: LanguageModel, held: HeldStages) -> dict[int, StagePart]:
    """Return the parts of a model by the numbers of their stages."""
    return {
        stage: StagePart(model, layers, is_first=stage == 0, is_last=stage == held.count - 1)
        for stage, layers in held.layers_of.items()
    }
