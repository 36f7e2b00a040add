"""The norm of the whole gradient, each element counted once whatever holds it, and clipping by it.

Parts that are split over the same axes are squared and summed together, and their sum is added up over those
axes: a dense weight under ZeRO-0 over none, under ZeRO-1 over the ZeRO axis, an expert over ep (and edp). The stages
of a pipeline add up their squares; a tied embedding, of which both ends hold a copy, is counted at the first. All ranks
get the same bits, because each takes the result of the same sums.
"""

from collections.abc import Iterable
from math import prod

import torch
from torch import Tensor

from meshwright.kernels.limits import USUAL
from meshwright.parallel.collectives import all_reduce
from meshwright.parallel.mesh import Axis
from meshwright.parallel.zero.part import Part

_ONE_STAGE = Axis("pp")


def gradient_norm(parts: Iterable[Part], pp: Axis = _ONE_STAGE, *, at_once: int = USUAL.squares) -> float:
    """Return the 2-norm of the gradient of the whole model, on every rank the same; `pp` joins its stages."""
    groups: dict[tuple[int, tuple[tuple[int, ...], ...]], tuple[tuple[Axis, ...], list[Tensor]]] = {}
    for part in parts:
        if any(axis.name == "ends" and axis.rank > 0 for axis in part.placement.grad_sum):
            continue
        copies = prod(split.copies for split in part.placement.splits)
        key = copies, tuple(axis.ranks for axis in part.split_axes)
        gradient = part.parameter.grad
        assert gradient is not None
        groups.setdefault(key, (part.split_axes, []))[1].append(gradient)
    total = 0.0
    # Sorted, so that every rank sums in one order; ranks of one group differ between ranks, their number does not.
    for (copies, _), (axes, gradients) in sorted(groups.items(), key=lambda item: [axis.name for axis in item[1][0]]):
        norms = torch.stack(torch._foreach_norm(_pieces(gradients, at_once)))
        wide = torch.float32 if norms.device.type == "mps" else torch.float64
        square = norms.to(wide).square().sum()
        for axis in axes:
            all_reduce(square, axis)
        total += square.item() / copies
    if pp.is_split:
        of_stages = torch.tensor(total, dtype=torch.float64, device=norms.device)
        all_reduce(of_stages, pp)
        total = of_stages.item()
    return float(total**0.5)


def _pieces(gradients: list[Tensor], at_once: int) -> list[Tensor]:
    """Return what torch takes the norms of, one by one; at least one tensor, which may be empty.

    On a CPU torch adds the squares of a tensor up one after the other in its own type: of 8 million fp32 numbers the
    norm is 2.5e-4 off, and another part of the same numbers is off by another error. Of 16,384 it is 1e-7.
    """
    held = [gradient for gradient in gradients if gradient.numel()] or gradients
    if held[0].device.type != "cpu":
        return held
    return [piece for gradient in held for piece in torch.split(gradient.reshape(-1), at_once)]


def clip_gradients(parts: Iterable[Part], norm: float, limit: float) -> None:
    """Scale every gradient so that the norm is at most `limit`; 0 is no limit."""
    if limit > 0 and norm > limit:
        gradients = [part.parameter.grad for part in parts if part.parameter.grad is not None]
        torch._foreach_mul_(gradients, limit / norm)
