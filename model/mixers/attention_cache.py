"""The keys and values of the tokens seen so far, for decoding: all of them, or those of a window.

room for max_len tokens      position p lies in row p; without a max_len room is doubled when it is full (model/room.py)
a window w < max_len         position p lies in row p mod w: memory does not grow with the tokens

w = 4, after 6 tokens        rows  4 5 2 3        in order  2 3 4 5
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from meshwright.kernels.attention.attention import cached_attention
from meshwright.kernels.attention.seen import Seen
from meshwright.model.room import refuse_beyond, with_room


@dataclass
class KeyValueCache:
    """The keys and values of the tokens seen so far, in room for all of them or for a window."""

    keys: Float[Tensor, "room b k d"]
    values: Float[Tensor, "room b k e"]
    max_len: int | None
    """How many tokens it was made for; None: it grows with them."""
    window: int = 0
    """How many it holds at most; 0: all."""
    length: int = 0
    at: Int64[Tensor, " s"] | None = None
    """Positions of the next tokens, where they do not follow on each other (model/depth.py)."""

    def next_rows(self, count: int) -> range:
        """Return which of all tokens the next ones are.

        Raises:
            ValueError: if there is no room for them.
        """
        end = self.length + count
        refuse_beyond(self.max_len, end)
        return range(self.length, end)

    def next_positions(self, count: int) -> Int64[Tensor, " s"]:
        """Return the positions of the next tokens."""
        if self.at is not None:
            return self.at
        return torch.arange(self.length, self.length + count, device=self.keys.device)

    def attend(
        self, q: Float[Tensor, "s b n d"], k: Float[Tensor, "s b k d"], v: Float[Tensor, "s b k e"], seen: Seen
    ) -> Float[Tensor, "s b n e"]:
        """Add the next tokens' keys and values, and attend from them to all that are held and seen."""
        begin, end = self.length, self.length + len(q)
        if self.max_len is None:
            self.keys, self.values = (with_room(rows, end, self.window) for rows in (self.keys, self.values))
        room = len(self.keys)
        self.length = end
        if end <= room:
            self.keys[begin:end], self.values[begin:end] = k, v
            return cached_attention(q, self.keys[:end].to(q.dtype), self.values[:end].to(q.dtype), seen)
        if len(q) == 1 and seen.bias is None:
            self.keys[begin % room], self.values[begin % room] = k[0], v[0]
            alone = Seen(scale=seen.scale)  # all that is held is seen, in any order
            return cached_attention(q, self.keys.to(q.dtype), self.values.to(q.dtype), alone, end - room)
        past = range(max(0, begin - room + 1), begin)
        rows = torch.arange(past.start, past.stop, device=q.device) % room
        keys = torch.cat([self.keys[rows].to(q.dtype), k])
        values = torch.cat([self.values[rows].to(q.dtype), v])
        kept = torch.arange(max(begin, end - room), end, device=q.device)
        # Rows by index are not cast to what holds them, as a stretch of rows is: autocast makes them narrower.
        self.keys[kept % room] = k[kept - begin].to(self.keys)
        self.values[kept % room] = v[kept - begin].to(self.values)
        return cached_attention(q, keys, values, seen, past.start)


def empty_cache(
    batch: int, max_len: int | None, window: int, num_kv_heads: int, widths: tuple[int, int], like: Tensor
) -> KeyValueCache:
    """Return a cache for `max_len` tokens of `batch` samples, of which it holds a window's, if that is not 0."""
    room = min(window or max_len, max_len) if max_len else 0
    keys, values = (like.new_empty(room, batch, num_kv_heads, width) for width in widths)
    return KeyValueCache(keys, values, max_len, window)
