"""Tokens that come from no run: what is asked of them, and their place, which says that targets of -100 do not count.

A run's tokens are checked where its store is read, and their place comes with them (launcher/training/one_step.py).
"""

from dataclasses import replace

import torch
from torch import Tensor

from meshwright.kernels.matmul.cross_entropy import NOT_COUNTED
from meshwright.parallel.where import Where, where_of_plain_tokens


def place_of_plain_tokens(tokens: Tensor, targets: Tensor | None, vocab_size: int, most: int | None = None) -> Where:
    """Return the place of whole samples [s, b] whose loss is to be the mean over the targets [s, b] that count.

    `most` is how many positions there are, if not any number.

    Raises:
        ValueError: naming everything about them that does not fit.
    """
    if problems := [*_shapes(tokens, targets, most), *_ids(tokens, targets, vocab_size)]:
        raise ValueError("\n".join(problems))
    where = where_of_plain_tokens(tokens)
    if targets is None:
        return where
    counted = targets != NOT_COUNTED
    return replace(where.counting(counted), step_tokens=float(max(1, int(counted.sum()))))


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


def _ids(tokens: Tensor, targets: Tensor | None, vocab_size: int) -> list[str]:
    problems = []
    for what, ids in (("tokens", tokens), ("targets", targets)):
        if ids is None:
            continue
        if ids.dtype != torch.int64:
            problems.append(f"{what} of {ids.dtype}: must be torch.int64")
        elif not (torch.compiler.is_compiling() or ids.is_meta):  # which knows no numbers
            is_id = (ids >= 0) & (ids < vocab_size)
            if what == "targets":
                is_id |= ids == NOT_COUNTED
            if not is_id.all():
                or_none = f", or {NOT_COUNTED} where none counts" if what == "targets" else ""
                first = int(ids[~is_id][0])
                problems.append(f"{what} with {first}: must be from 0 to vocab_size - 1 = {vocab_size - 1}{or_none}")
    return problems
