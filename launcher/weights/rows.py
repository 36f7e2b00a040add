"""Foreign tensors from ours, and ours from foreign ones, as a family's rows say (model/families/family.py).

    joined(row, parts)                 one foreign tensor, of its sources
    read_ours(row, 1, (0, 4), read)    rows 0 to 3 of the second source, of the bytes that hold them

A row that is joined in groups is read in whole groups; all others as exactly the rows that are wanted.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from meshwright.model.families.family import Row, span_of

# Takes a foreign name, whether the rows lie in the last dim, the first one and that behind the last.
ReadForeign = Callable[[str, bool, int, int], Tensor]


def joined(row: Row, parts: Sequence[Tensor]) -> Tensor:
    """Return the foreign tensor of a row from its sources, in their order."""
    if row.is_plain:
        return parts[0].reshape(row.shape)
    whole = torch.cat([part.reshape(row.groups, -1, *row.tail) for part in parts], 1)
    if row.pairs:
        whole = torch.cat([whole[:, : -row.pairs], _two_by_two(whole[:, -row.pairs :])], 1)
    return whole.reshape(row.shape[::-1]).T if row.is_transposed else whole.reshape(row.shape)


def read_ours(row: Row, number: int, rows: tuple[int, int], read: ReadForeign) -> Tensor:
    """Return rows (along dim 0) of our source `number` of a foreign tensor."""
    source, (first, end) = row.sources[number], rows
    wanted = (end - first, *source.shape[1:])
    span = span_of(row, number, first, end)
    block = read(row.theirs, row.is_transposed, span.first, span.end)
    flat = (block.T if row.is_transposed else block).reshape(-1, *row.tail)[span.skipped : span.skipped + span.rows]
    if span.is_exact:
        return flat.reshape(wanted)
    groups = flat.reshape(-1, row.group_rows, *row.tail)
    if row.pairs:
        groups = torch.cat([groups[:, : -row.pairs], _halves(groups[:, -row.pairs :])], 1)
    run = source.rows // row.groups
    before = sum(other.rows for other in row.sources[:number]) // row.groups
    mine = groups[:, before : before + run].reshape(-1, *row.tail)
    each = source.rows // source.shape[0]
    skipped = first * each % run
    return mine[skipped : skipped + (end - first) * each].reshape(wanted)


def _two_by_two(rows: Tensor) -> Tensor:
    """Return rows of which the two of a pair are half apart with the two side by side."""
    return torch.unflatten(rows, 1, (2, -1)).transpose(1, 2).flatten(1, 2)


def _halves(rows: Tensor) -> Tensor:
    """Return rows of which the two of a pair are side by side with the two half apart."""
    return torch.unflatten(rows, 1, (-1, 2)).transpose(1, 2).flatten(1, 2)
