"""Tokens that come from no run: what is asked of them, and their place, which says that targets of -100 do not count.

A run's tokens are checked where its store is read, and their place comes with them (launcher/training/one_step.py).
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from meshwright.kernels.matmul.cross_entropy import NOT_COUNTED
from meshwright.parallel.where import Where, where_of_plain_tokens


def place_of_plain_tokens(
    tokens: Tensor, targets: Tensor | None, vocab_size: int, most: int | None = None, *, is_training: bool = False
) -> Where:
    """Return the place of whole samples [s, b] whose loss is to be the mean over the targets [s, b] that count.

    `most` is how many positions there are, if not any number. In training each call has a step of its own, of torch's
    usual random numbers (`torch.manual_seed`): by it goes what dropout and noise draw.

    Raises:
        ValueError: naming everything about them that does not fit.
    """
    problems, of_types = _shapes(tokens, targets, most), _types(tokens, targets)
    if not (of_types or _knows_no_numbers(tokens) or torch.compiler.is_compiling()):
        problems += _ids(tokens, targets, vocab_size)
    problems += of_types
    if problems:
        raise ValueError("\n".join(problems))
    where = where_of_plain_tokens(tokens, _any_step() if is_training and not _is_once(tokens) else 0)
    if targets is None or (_knows_no_numbers(tokens) and not torch.compiler.is_compiling()):
        return where
    counted = targets != NOT_COUNTED
    return replace(where.counting(counted), step_tokens=counted.sum().clamp(min=1).double().item())


def _knows_no_numbers(tokens: Tensor) -> bool:
    """Say whether only shapes are asked for."""
    return tokens.is_meta or isinstance(tokens, FakeTensor)


def _is_once(tokens: Tensor) -> bool:
    """Say whether this is done once for all calls to come: where a graph is exported, or only shapes are asked for."""
    return torch.compiler.is_exporting() or _knows_no_numbers(tokens)


def _any_step() -> int:
    return int(torch.randint(2**31, ()))


def _shapes(tokens: Tensor, targets: Tensor | None, most: int | None) -> list[str]:
    shape = list(tokens.shape)
    if tokens.dim() != 2:
        return [f"tokens of shape {shape}: must be [s, b], the tokens of a sample along the first dim"]
    if not tokens.numel():
        return [f"tokens of shape {shape}: must be at least 1 of at least 1 sample"]
    problems = []
    if most is not None and len(tokens) > most:
        problems.append(
            f"tokens of shape {shape}: {len(tokens)} of a sample are more than the {most} learned positions"
        )
    if targets is not None and targets.shape != tokens.shape:
        problems.append(f"targets of shape {list(targets.shape)}: must be of the tokens' shape, {shape}")
    return problems


def _types(tokens: Tensor, targets: Tensor | None) -> list[str]:
    fits = {"tokens": (tokens, (torch.int64, torch.int32)), "targets": (targets, (torch.int64,))}
    return [
        f"{what} of {ids.dtype}: must be {' or '.join(map(str, types))}"
        for what, (ids, types) in fits.items()
        if ids is not None and ids.dtype not in types
    ]


def _ids(tokens: Tensor, targets: Tensor | None, vocab_size: int) -> list[str]:
    wrong = {"tokens": (tokens < 0) | (tokens >= vocab_size)}
    given = {"tokens": tokens}
    if targets is not None:
        given["targets"] = targets
        wrong["targets"] = ((targets < 0) | (targets >= vocab_size)) & (targets != NOT_COUNTED)
    # One look at the device for both.
    is_wrong = torch.stack([each.any() for each in wrong.values()]).tolist()
    problems = []
    for what, is_some in zip(wrong, is_wrong, strict=True):
        if is_some:
            or_none = f", or {NOT_COUNTED} where none counts" if what == "targets" else ""
            first = int(given[what][wrong[what]][0])
            problems.append(f"{what} with {first}: must be from 0 to vocab_size - 1 = {vocab_size - 1}{or_none}")
    return problems
