"""Room for what decoding keeps of each token: made once where their number is known, else doubled when it is full.

    room for 4, a fifth comes      rows  a b c d      ->      a b c d e . . .

So a row is copied about once on average, and less than half of the room stands empty, however many tokens come.
"""

from torch import Tensor

LEAST = 16
"""Tokens that there is room for from the first one on."""


def refuse_beyond(max_len: int | None, needed: int, what: str = "the cache") -> None:
    """Refuse more tokens than a state was made for; one that was made for no number of them (None) has room for all.

    Raises:
        ValueError: with both numbers.
    """
    if max_len is not None and needed > max_len:
        raise ValueError(f"{what} has room for {max_len} tokens, {needed} are needed")


def with_room(rows: Tensor, needed: int, most: int = 0) -> Tensor:
    """Return rows that have room for `needed` of them, and what these held; never more than `most`, if that is not 0.

    Where there is room already they are the same.
    """
    room = len(rows)
    needed = min(needed, most) if most else needed
    if needed <= room:
        return rows
    size = max(needed, 2 * room, LEAST)
    grown = rows.new_empty(min(size, most) if most else size, *rows.shape[1:])
    grown[:room] = rows
    return grown
