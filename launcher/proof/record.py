"""What a run leaves to compare, in global terms: every number with its place in what one device would hold.

    Piece     a box of a global tensor: where it begins, and its numbers (padding is cut off)
    AtTokens  rows that belong to tokens: for each the global sample, the position in it, and numbers

    step   tokens and targets      as the model saw them
           outputs                 of the embedding and of every block, at each token; of the embedding also what the
                                   prediction of a further token is given, which is of the token there
           decisions, margins      experts of each token by layer, and by how much the last of them won
           loss, norm, sums        over all ranks
           gradients               summed over the ranks, before they are clipped
           weights                 after the update
           evaluation              with these weights: the loss on held-out samples, and their tokens

A `Recorder` listens to a run that is driven by the product's own `one_step`; it computes nothing of its own. A rank
records what it holds, and the comparison sees to it that together they hold everything.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from meshwright.launcher.build import Run
from meshwright.launcher.proof.choices import watch_choices
from meshwright.launcher.training.progress import held_tensors
from meshwright.model.block import Block
from meshwright.model.multi_token import FurtherToken
from meshwright.model.stage import MicroBatch, StagePart
from meshwright.parallel.checkpoint.describe import HeldPart
from meshwright.parallel.placement import without_padding
from meshwright.parallel.tensor.vocabulary import Embedding
from meshwright.parallel.where import Where

Array = np.ndarray[Any, np.dtype[Any]]
Decide = Callable[[str, Array, Array, Array, Array], Array]
"""(layer, sample, position, what the router chose, margins) -> what it is to choose."""
Work = Literal["attention", "experts", "adamw"]
"""What there is a fast operator for."""


@dataclass(frozen=True)
class Piece:
    """A box of a global tensor."""

    shape: tuple[int, ...]
    """Of the global tensor."""
    offset: tuple[int, ...]
    values: Array


@dataclass
class AtTokens:
    """Rows of numbers, each of one token."""

    sample: Array
    position: Array
    values: Array

    @classmethod
    def joined(cls, parts: "list[AtTokens]") -> "AtTokens":
        """Return the rows of several micro-batches together."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))


@dataclass
class StepRecord:
    """What one rank saw of one step."""

    learning_rate: float = 0.0
    loss: float = 0.0
    norm: float = 0.0
    sums: dict[str, Array] = field(default_factory=dict)
    at_tokens: dict[str, AtTokens] = field(default_factory=dict)
    """tokens, targets, `<module> output`, `<layer> experts`, `<layer> margin`; in the order of the forward pass."""
    gradients: dict[str, Piece] = field(default_factory=dict)
    weights: dict[str, Piece] = field(default_factory=dict)
    evaluation: tuple[float, int] | None = None
    """The loss on the held-out samples and the tokens that it was measured on, where the run evaluates."""
    share: float = 0.0
    """Of the loss, what this rank's own tokens are; all ranks' together are the loss."""


@dataclass
class RankRecord:
    """What one rank leaves."""

    steps: list[StepRecord] = field(default_factory=list)
    held: dict[str, Piece] = field(default_factory=dict)
    """Everything that a checkpoint has, at the end."""
    computed: dict[str, Piece] = field(default_factory=dict)
    """The weights that the model would compute the next step with, where they were asked for."""
    not_saved: str = ""
    """Why no checkpoint could be written, where that is so: the ranks' copies of a tensor may differ."""
    operators: frozenset[str] = frozenset()
    """Names of torch's operators that ran in the first step, where they were asked for."""
    narrow_sums: frozenset[str] = frozenset()
    """Sums over samples that were made in less than fp32, where they were looked for (`dtype_of_sums.py`)."""
    work: frozenset[Work] = frozenset()
    """What of this the rank itself had to do in that step."""


class Recorder:
    """Listens to a run; `finish` hands out what was heard since the last call."""

    def __init__(self, run: Run, *, outputs: bool = True, decide: Decide | None = None) -> None:
        """Hook into the run's modules and its engine; `decide` may choose experts in the router's place."""
        self._run, self._decide = run, decide
        self._where: Where | None = None
        self._seq_len = 0
        self._begins = False
        self._rows: dict[str, list[AtTokens]] = {}
        self._gradients: dict[str, Piece] = {}
        self._seen: set[tuple[str, int, int]] = set()
        run.model.register_forward_pre_hook(self._on_model)
        for part in run.pipeline.parts.values() if run.pipeline is not None else ():
            assert isinstance(part, StagePart)
            self._watch_stage(part)
        for name, module in run.model.named_modules():
            if isinstance(module, Block | FurtherToken):
                module.register_forward_pre_hook(self._on_place, with_kwargs=True)
            if outputs:
                self._watch_output(name, module)
            watch_choices(module, name, self._choose)
        _after(run.engine, "finish_gradients", self._take_gradients)

    def finish(self, learning_rate: float, loss: float, norm: float, sums: dict[str, Tensor]) -> StepRecord:
        """Return the step that has just been made."""
        of_layers = {name: value.numpy() for name, value in sums.items() if name.startswith("layers.")}
        rows = {name: AtTokens.joined(parts) for name, parts in self._rows.items()}
        parts = held_tensors(self._run, optimizer=False)
        weights = {name: piece_of(part) for name, part in parts.items() if not name.startswith("buffers.")}
        step = StepRecord(learning_rate, loss, norm, of_layers, rows, self._gradients, weights)
        self.forget()
        return step

    def forget(self) -> None:
        """Leave out what was heard since the last call: it belongs to no step."""
        self._rows, self._gradients, self._seen = {}, {}, set()

    def _on_model(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        tokens, targets, where, *_tally = args  # an evaluation counts nothing
        self._begin(where, has_embedding=True)
        self._add("tokens", tokens.flatten())
        self._add("targets", targets.flatten())

    def _watch_stage(self, part: StagePart) -> None:
        """Listen to a stage of a pipeline, which is told its micro-batches before the step, and then their numbers."""
        of_step: list[MicroBatch] = []
        start_step = part.start_step

        def started(micro_batches: Sequence[MicroBatch], *more: Any) -> None:
            of_step[:] = micro_batches
            start_step(micro_batches, *more)

        def called(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            micro_batch = of_step[int(kwargs["number"])]
            self._begin(micro_batch.where, has_embedding=part.is_first)
            if part.is_first:
                self._add("tokens", micro_batch.tokens.flatten())
            if part.is_last:
                self._add("targets", micro_batch.targets.flatten())

        setattr(part, "start_step", started)  # noqa: B010  (a module takes a function as an attribute)
        part.register_forward_pre_hook(called, with_kwargs=True)

    def _begin(self, where: Where, *, has_embedding: bool) -> None:
        self._where, self._seq_len, self._begins = where, len(where.document_whole), has_embedding

    def _on_place(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._where = next((value for value in (*args, *kwargs.values()) if isinstance(value, Where)), self._where)

    def _watch_output(self, name: str, module: nn.Module) -> None:
        def of_block(_module: nn.Module, _given: Any, output: Tensor) -> None:
            self._add(f"{self._of_lap(name)} output", output.flatten(0, 1))

        def of_embedding(_module: nn.Module, _given: Any, output: Tensor) -> None:
            # It runs again for further tokens, behind the last layer, in a pipeline on another rank.
            if self._begins:
                self._begins = False
                self._add(f"{name} output", output.flatten(0, 1))

        def of_further_token(_module: nn.Module, given: tuple[Any, ...]) -> None:
            self._add(f"embedding for {name} output", given[1].flatten(0, 1))

        if isinstance(module, Block):
            module.register_forward_hook(of_block)
        elif isinstance(module, Embedding):
            module.register_forward_hook(of_embedding)
        elif isinstance(module, FurtherToken):
            module.register_forward_pre_hook(of_further_token)

    def _choose(
        self, name: str, chosen: Tensor, margin: Tensor, where: Where | None, position: Tensor | None
    ) -> Tensor:
        """Keep what was chosen for each token and return what is to be; `where` and `position` if others than heard."""
        self._where = where or self._where
        layer, at = self._of_lap(name), self._places(len(chosen), position)
        self._add(f"{layer} experts", chosen, at)
        self._add(f"{layer} margin", margin, at)
        if self._decide is None:
            return chosen
        decided, is_there = chosen.numpy().copy(), at[1] < self._seq_len
        given = (each[is_there] for each in (*at, decided, _numbers(margin)))
        decided[is_there] = self._decide(layer, *given)
        return torch.from_numpy(decided)

    def _of_lap(self, name: str) -> str:
        """Return a module's name, and which use it is where a layer is used once more: the choice is another."""
        lap = 0 if self._where is None else self._where.lap
        return f"{name}, lap {lap + 1}" if lap else name

    def _places(self, count: int, position: Tensor | None = None) -> tuple[Array, Array]:
        """Return sample and position of each of `count` tokens, sequence first, as this rank holds them.

        `position` is theirs if they are none of those that a layer holds.
        """
        where = self._where
        assert where is not None, "a part of the model was called without a place"
        sample = where.sample.numpy()
        for known in (position,) if position is not None else (where.position, getattr(where, "position_mixed", None)):
            if known is not None and len(known) * len(sample) == count:
                return np.tile(sample, len(known)), np.repeat(known.numpy(), len(sample))
        raise AssertionError(f"{count} tokens are none of a layer's")

    def _add(self, name: str, rows: Tensor, at: tuple[Array, Array] | None = None) -> None:
        """Keep a row for each token; a pass that is made again for the backward is not kept.

        Rows behind a sample's last are of no token: they fill up a layer of Mixture-of-Depths, by layout.
        """
        sample, position = at or self._places(len(rows))
        key, is_there = (name, int(sample[0]), int(position[0])), position < self._seq_len
        if key not in self._seen:
            self._seen.add(key)
            kept = AtTokens(sample[is_there], position[is_there], _numbers(rows)[is_there])
            self._rows.setdefault(name, []).append(kept)

    def _take_gradients(self) -> None:
        for name, part in self._run.engine.parts.items():
            gradient = part.parameter.grad
            if gradient is not None:
                self._gradients[name] = piece_of(HeldPart(gradient, part.global_shape, part.offset))


def computed_weights(run: Run) -> dict[str, Piece]:
    """Return what the modules compute with, in its own type; every rank must come here, because FSDP2 gathers."""
    stages = run.pipeline.parts.values() if run.pipeline is not None else ()
    modules = dict.fromkeys(module for root in (run.model, *stages) for module in root.modules())
    units = [module for module in modules if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
    found = {}
    for name, weight in run.model.named_parameters():
        # A copy: numpy would hold on to memory that FSDP2 is to let go of.
        part, local = run.engine.parts[name], weight.detach().clone()
        assert not isinstance(local, DTensor), f"{name} is not gathered"
        found[name] = piece_of(HeldPart(local, part.global_shape, part.placement.offset(tuple(local.shape))))
    for unit in units:
        unit.reshard()
    return found


def piece_of(part: HeldPart) -> Piece:
    """Return a copy of what a rank holds, without the rows that lie beyond the global tensor."""
    held = without_padding(part.tensor.detach(), part.global_shape, part.offset)
    return Piece(part.global_shape, part.offset, _numbers(held))


def _numbers(tensor: Tensor) -> Array:
    """Return a copy in numpy, which has no bf16."""
    tensor = tensor.detach().cpu()
    array: Array = (tensor.to(torch.float32) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array.copy()


def _after(target: object, name: str, then: Callable[[], None]) -> None:
    """Let `then` be called after each call of a method of this one object."""
    method: Callable[..., Any] = getattr(target, name)

    def called(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        then()
        return result

    setattr(target, name, called)
