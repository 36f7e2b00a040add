"""Sums and counts of one step, from every layer and micro-batch, reduced over all ranks once.

Layers add to entries that were declared when the model was built, so that every rank reduces the same
flat vector, also where a stage of the pipeline holds only some layers. The flags on which all ranks must
agree (stop, save) are entries too: raised by one rank, seen by all at the same step. That a loss is not a
number needs no flag: the sum of all ranks' losses is none then.

An auxiliary loss enters the gradient through `attach_loss`, an identity on the activations; its value is
added to the tally. So it needs no way to the last stage, and a recomputed forward pass, during which the
tally is paused, counts nothing twice.

    tally = tally_of(model)                    once
    model(..., tally=tally).backward()         for each micro-batch: without a tally there are no auxiliary losses
    sums = finish_step(model, tally)           once a step: routers' biases and thresholds move by what was counted
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshwright.parallel.collectives import all_reduce
from meshwright.parallel.mesh import Axis, Mesh, single_process_mesh

T = TypeVar("T")


class Tally:
    """Named sums, each a vector of fixed length, in one flat buffer."""

    def __init__(self, entries: dict[str, int], device: torch.device | str = "cpu") -> None:
        """Take each entry's length; keep fp64 where the device has it, so that counts are exact."""
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        self._flat = torch.zeros(sum(entries.values()), dtype=dtype, device=device)
        self._views = (
            dict(zip(entries, torch.split(self._flat, list(entries.values())), strict=True)) if entries else {}
        )
        self._paused = False

    def add(self, name: str, value: Tensor | float) -> None:
        """Add to one entry; nothing happens while the tally is paused."""
        if self._paused:
            return
        assert name in self._views, f"{name} was not declared"
        self._views[name] += value.detach().to(self._flat) if isinstance(value, Tensor) else value

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore what is added inside: a recomputed forward pass counts nothing."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def reduce(self, mesh: Mesh) -> dict[str, Tensor]:
        """Return every entry summed over all ranks, on the CPU, and start again from zero."""
        all_reduce(self._flat, mesh.world)
        sums = self._flat.cpu()
        lengths = [len(view) for view in self._views.values()]
        reduced = dict(zip(self._views, torch.split(sums.clone(), lengths), strict=True)) if lengths else {}
        self._flat.zero_()
        return reduced


def declared_entries(model: nn.Module) -> dict[str, int]:
    """Return what the model's modules will add, by entry name: every module's `tally_entries()` together.

    Raises:
        ValueError: if two modules would add to the same entry.
    """
    entries: dict[str, int] = {}
    for module in model.modules():
        say = getattr(module, "tally_entries", None)
        own = say() if callable(say) else {}
        if twice := [name for name in own if name in entries]:
            raise ValueError(f"{twice[0]} would be counted by two modules; another name for one of them would fit")
        entries |= own
    return entries


def tally_of(model: nn.Module, device: torch.device | str | None = None) -> Tally:
    """Return a tally of all that the model, or a part of one, will add; None: on the device of its parameters."""
    if device is None:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return Tally(declared_entries(model), device)


def finish_step(model: nn.Module, tally: Tally, mesh: Mesh | None = None) -> dict[str, Tensor]:
    """Sum what a step tallied over all ranks, let the modules that act on it take it, and return it.

    To be called once for each update, on every rank: by this the bias of a sigmoid router and the thresholds of expert
    choice move, and "step" balancing learns the load. The tally begins again from zero.
    """
    sums = tally.reduce(mesh or single_process_mesh())
    take_sums(model, sums)
    return sums


def take_sums(model: nn.Module, sums: dict[str, Tensor]) -> None:
    """Let every module that watches the step's sums take them."""
    for module in model.modules():
        take = getattr(module, "finish_step", None)
        if callable(take):
            take(sums)


def attach_loss(x: Tensor, loss: Tensor) -> Tensor:
    """Return `x` unchanged; in the backward pass `loss` receives the gradient 1, as if added to the total loss."""
    attached: Tensor = _AttachLoss.apply(x, loss)  # type: ignore[no-untyped-call]
    return attached


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_like = (loss.shape, loss.dtype, loss.device)
        # A single number may be what the model returns, and FSDP2 refuses a view there.
        return x.clone() if x.ndim == 0 else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.loss_like
        return grads[0], torch.ones(shape, dtype=dtype, device=device)


def everyones_entries(mine: dict[str, int], pp: Axis) -> dict[str, int]:
    """Return the entries of all stages of a pipeline, in one order on all ranks: that of the layers' numbers."""
    together = {name: length for entries in _gathered(mine, pp) for name, length in entries.items()}
    return {name: together[name] for name in in_number_order(together)}


def in_number_order(names: Iterable[str]) -> list[str]:
    """Sort names so that `layers.2` comes before `layers.10`."""
    return sorted(
        names,
        key=lambda name: [
            (not part.isdigit(), int(part or 0) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)
        ],
    )


def gather_texts(mine: list[str], mesh: Mesh) -> list[str]:
    """Return every rank's lines in rank order; for messages when a run ends, not for a step that goes on."""
    return [line for lines in _gathered(mine, mesh.world) for line in lines]


def _gathered(mine: T, axis: Axis) -> list[T]:
    """Return what every rank along an axis has, in axis order."""
    if not axis.is_split:
        return [mine]
    everyones: list[T] = [mine] * axis.size
    dist.all_gather_object(everyones, mine, group=axis.group)
    return everyones
