"""Muon: the averaged gradient of each matrix, made orthogonal (Keller Jordan 2024), over parts of any layout.

    m   <- momentum * m + (1 - momentum) * g           on this rank's part
    u    = momentum * m + (1 - momentum) * g           (Nesterov; else m)
    o    = orthogonalise(u)                            on whole matrices, each by one rank (parallel/whole)
    w   <- (1 - lr * decay) * w - lr * 0.2 * sqrt(max(rows, cols)) * o

The scale is Moonlight's (arXiv 2502.16982, section 2.2): an orthogonal [rows, cols] has elements of root mean square
1 / sqrt(max(rows, cols)), and AdamW's updates have about 0.2 to 0.4 in practice, so that one learning rate and one
weight decay serve both. Keller Jordan's own sqrt(max(1, rows / cols)) would need a learning rate of its own. The
average is normalised before it is made orthogonal: clipping and the loss's scale change its direction, not its size.

Products are in bf16 on a CUDA device, in fp32 elsewhere, and in fp64 where the weights are. Of a stack [e, out, in]
each of the e is a matrix. State is one tensor for each part, half of AdamW's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod, sqrt

import torch
from torch import Tensor

from meshwright.kernels.limits import USUAL, Limits
from meshwright.kernels.matmul.newton_schulz import multiplications, orthogonalise
from meshwright.launcher.runfile.optimizer_rules import Settings
from meshwright.launcher.runfile.tables import OptimizerConfig
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.whole.shared_work import Matrix, SharedWork, way_of_cutting
from meshwright.parallel.whole.tensors import held_box
from meshwright.parallel.zero.part import Part

MOMENTUM = "momentum"


@dataclass(frozen=True)
class _Batch:
    """Matrices whose whole selves are worked on together."""

    matrices: list[Matrix]
    work: SharedWork


class Muon:
    """Muon with decoupled weight decay, for parts that are matrices or stacks of them."""

    def __init__(
        self,
        parts: Mapping[str, Part],
        settings: Mapping[str, Settings],
        config: OptimizerConfig,
        mesh: Mesh,
        limits: Limits = USUAL,
    ) -> None:
        """Make the averages, all zero, and divide the work; every rank of the parts' axes must come here alike."""
        self._parts, self._settings = parts, settings
        self._momentum, self._is_nesterov = config.muon_momentum, config.muon_nesterov
        self._state = {name: torch.zeros_like(part.parameter) for name, part in parts.items()}
        self._orthogonal = partial(orthogonal, steps=config.muon_steps, at_once=limits.muon_multiplied)
        self._batches = _batches(parts, mesh, config.muon_steps, limits.muon_exchanged)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update every part from its gradient; every rank must call this."""
        for name, part in self._parts.items():
            if part.parameter.numel():
                assert part.parameter.grad is not None, f"{name} has no gradient"
                self._state[name].lerp_(part.parameter.grad, 1.0 - self._momentum)
        for batch in self._batches:
            held = [self._update_of(matrix) for matrix in batch.matrices]
            updates = batch.work.on_wholes(held, self._orthogonal)
            for matrix, update in zip(batch.matrices, updates, strict=True):
                self._apply(matrix, update, learning_rate)

    def moments(self, name: str) -> dict[str, Tensor]:
        """Return the average of one part's gradient by its name, of the part's shape."""
        return {MOMENTUM: self._state[name]}

    def _update_of(self, matrix: Matrix) -> Tensor:
        """Return this rank's piece of what is made orthogonal, in the type of the products."""
        part = self._parts[matrix.name]
        average = self._piece(matrix, self._state[matrix.name])
        if self._is_nesterov and part.parameter.grad is not None:  # where nothing is held there may be none
            average = self._piece(matrix, part.parameter.grad).lerp(average, self._momentum)
        return average.to(product_type(average))

    def _apply(self, matrix: Matrix, update: Tensor, learning_rate: float) -> None:
        part, settings = self._parts[matrix.name], self._settings[matrix.name]
        weight = self._piece(matrix, part.parameter.detach())
        rate = learning_rate * settings.learning_rate_factor
        weight.mul_(1.0 - rate * settings.weight_decay)
        weight.add_(update, alpha=-rate * update_scale(*part.global_shape[-2:]))

    def _piece(self, matrix: Matrix, held: Tensor) -> Tensor:
        """Return what this rank holds of a matrix, a view of what it holds of the parameter."""
        real = self._parts[matrix.name].real(held)
        return real.view(prod(real.shape[:-2]), *real.shape[-2:])[matrix.number]


def update_scale(rows: int, cols: int) -> float:
    """Return what an orthogonal update is multiplied with to be as large as one of AdamW's."""
    return 0.2 * sqrt(max(rows, cols))


def product_type(weight: Tensor) -> torch.dtype:
    """Return the type in which updates of such weights are made orthogonal and sent."""
    return torch.bfloat16 if weight.device.type == "cuda" and weight.dtype != torch.float64 else weight.dtype


def orthogonal(matrices: list[Tensor], steps: int, at_once: int = USUAL.muon_multiplied) -> list[Tensor]:
    """Make each matrix orthogonal; those of one shape in batched products of at most so many elements."""
    alike: dict[torch.Size, list[int]] = {}
    for at, matrix in enumerate(matrices):
        alike.setdefault(matrix.shape, []).append(at)
    results = list(matrices)
    for shape, places in alike.items():
        number = max(1, at_once // max(1, shape.numel()))
        for begin in range(0, len(places), number):
            some = places[begin : begin + number]
            together = orthogonalise(torch.stack([matrices[at] for at in some]), steps)
            for at, result in zip(some, together.unbind(), strict=True):
                results[at] = result
    return results


def _batches(parts: Mapping[str, Part], mesh: Mesh, steps: int, exchanged: int) -> list[_Batch]:
    """Put matrices together that were cut alike, as many as one exchange should carry; alike on all their ranks."""
    alike: dict[tuple[object, ...], list[Matrix]] = {}
    for name, part in parts.items():
        stacked = prod(held_box(part, mesh).size[:-2])
        key = (*way_of_cutting(part, mesh), part.parameter.dtype)
        alike.setdefault(key, []).extend(Matrix(name, number) for number in range(stacked))
    cost = partial(multiplications, steps=steps)
    batches: list[_Batch] = []
    for matrices in alike.values():
        begin, elements = 0, 0
        for at, matrix in enumerate(matrices):
            size = prod(parts[matrix.name].global_shape[-2:])
            if at > begin and elements + size > exchanged * _workers(parts[matrix.name], mesh):
                batches.append(_Batch(matrices[begin:at], SharedWork(parts, matrices[begin:at], mesh, cost)))
                begin, elements = at, 0
            elements += size
        if matrices:
            batches.append(_Batch(matrices[begin:], SharedWork(parts, matrices[begin:], mesh, cost)))
    return batches


def _workers(part: Part, mesh: Mesh) -> int:
    """Return over how many ranks matrices that were cut like this part are divided."""
    return prod(max(1, len(ranks)) for ranks in way_of_cutting(part, mesh))
