"""Attention to some of the keys by tiles of plain products: any `Seen`, any device and dtype, forward and backward.

A tile is a stretch of queries of some heads of one sample, and the stretches of keys that they see. What no query of
a tile sees is not computed, so a window costs s * window and not s * s:

    keys      0    64   128  192  256
    tile 0    [ w  ]                        window 64, tiles of 64 queries: two blocks of keys each,
    tile 1    [   w    ]                    the corners (beyond the window, after the query) masked
    tile 2         [   w    ]
    tile 3              [   w    ]

    forward    S = scale Q K^T + bias    P = exp(S - m)    l = rowsum(P)    O = (M P) V / l    lse = m + log l
    backward   P = exp(S - lse) once more            dP = M (dO V^T)        dS = P (dP - rowsum(dO O))
               dV += (M P)^T dO     dQ += scale dS K        dK += scale dS^T Q        dbias[i - j] += dS[i, j]

M are the factors of dropout, made again in the backward. Out and lse are those of `flash.py`, so that parts of the
keys can be put together; kept for the backward are q, k, v, out and lse, and no matrix of positions. A query that sees
no key has out 0 and lse -inf. The r query heads that share a key head are rows of one product, [k, r * rows, d]. Values
may be of another width than keys.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from meshwright.kernels.as_one import as_one
from meshwright.kernels.attention.seen import Seen
from meshwright.kernels.limits import USUAL
from meshwright.kernels.precision import at_least_fp32, without_autocast

ROWS = 64
"""Queries of a tile on a CPU, at most; four times as many where the window is wide, and on a GPU 16 times."""
SCORES = 1 << 20
"""Scores of a tile on a CPU: 4 MiB of fp32; 64 times as many on a GPU."""


ATTENTION = "attention by tiles"


class Span(NamedTuple):
    """Where the queries and keys that are given stand in their sample, and what is seen."""

    seen: Seen
    first_query: int = 0
    first_key: int = 0
    of_queries: Int[Tensor, "s b"] | None = None
    """Documents of the queries; None: they see every key's."""
    of_keys: Int[Tensor, "c b"] | None = None
    entries: int = USUAL.mask_entries
    """Scores that are made at a time, at most; a row of them at least."""


def tiled_attention(
    q: Float[Tensor, "s b n d"], k: Float[Tensor, "c b k d"], v: Float[Tensor, "c b k e"], span: Span
) -> tuple[Float[Tensor, "s b n e"], Float[Tensor, "s b n"]]:
    """Return the average over the keys that are seen and the log-sum-exp of their scores, in at least fp32."""
    out, lse = as_one(ATTENTION, lambda: _tiled(q, k, v, span))
    return out, lse


def _tiled(q: Tensor, k: Tensor, v: Tensor, span: Span) -> tuple[Tensor, Tensor]:
    q_, k_, v_ = at_least_fp32(q), at_least_fp32(k), at_least_fp32(v)
    out = q_.new_zeros(*q.shape[:3], v.shape[3])
    lse = q_.new_full(q.shape[:3], -torch.inf)
    with without_autocast(q):
        for tile in _tiles(q_, k_, span):
            keys, values = tile.keys_of(k_), tile.keys_of(v_)
            p = tile.scores(q_, keys, span)
            top = p.amax(-1, keepdim=True)
            top.masked_fill_(top == -torch.inf, 0.0)
            p.sub_(top).exp_()
            total = p.sum(-1, keepdim=True)
            if span.seen.drop is not None:
                p.mul_(tile.factors(span, p))
            mixed = torch.bmm(p.flatten(1, 2), values).view(*p.shape[:3], -1)
            tile.put(out, mixed.div_(total.masked_fill(total == 0.0, 1.0)))
            tile.put(lse[..., None], top.add_(total.log_()))
    return out, lse


def tiled_gradients(
    grad: Float[Tensor, "s b n e"],
    q: Float[Tensor, "s b n d"],
    k: Float[Tensor, "c b k d"],
    v: Float[Tensor, "c b k e"],
    results: tuple[Tensor, Tensor],
    span: Span,
    of_bias: Float[Tensor, "n distances"] | None = None,
) -> tuple[Float[Tensor, "s b n d"], Float[Tensor, "c b k d"], Float[Tensor, "c b k e"]]:
    """Return what these keys add to the gradients of q, k and v, and add to `of_bias` what they add to the bias's.

    `results` are out and log-sum-exp of *all* keys.
    """
    grad, q_, k_, v_, out = (at_least_fp32(x) for x in (grad, q, k, v, results[0]))
    scale, lse = span.seen.scale_of(q), results[1][..., None]
    mean = (grad * out).sum(-1, keepdim=True)
    of_q, of_k, of_v = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q_, k_, v_))
    with without_autocast(q):
        for tile in _tiles(q_, k_, span):
            keys, values, g = tile.keys_of(k_), tile.keys_of(v_), tile.rows_of(grad).flatten(1, 2)
            p = tile.scores(q_, keys, span)
            p.sub_(tile.rows_of(lse).masked_fill(tile.rows_of(lse) == -torch.inf, 0.0)).exp_()
            d = torch.bmm(g, values.transpose(1, 2)).view(p.shape)
            weights = p
            if span.seen.drop is not None:
                factors = tile.factors(span, p)
                weights = p * factors
                d.mul_(factors)
            tile.add_keys(of_v, torch.bmm(weights.flatten(1, 2).transpose(1, 2), g))
            d.sub_(tile.rows_of(mean)).mul_(p)
            if of_bias is not None:
                tile.add_bias(of_bias, d, span)
            rows = tile.rows_of(q_).flatten(1, 2)
            flat = d.mul_(scale).flatten(1, 2)
            tile.add_rows(of_q, torch.bmm(flat, keys).view(*d.shape[:3], -1))
            tile.add_keys(of_k, torch.bmm(flat.transpose(1, 2), rows))
    return of_q, of_k, of_v


class _Tile(NamedTuple):
    """Queries of some heads of a sample, by positions, and the keys that some of them see."""

    sample: int
    heads: slice
    """Of the keys."""
    shared: int
    """r: query heads on one key head."""
    queries: range
    keys: list[range]
    first_query: int
    first_key: int

    @property
    def query_heads(self) -> range:
        """Return which heads of the queries these are."""
        return range(self.heads.start * self.shared, self.heads.stop * self.shared)

    def rows_of(self, x: Tensor) -> Tensor:
        """[s, b, n, d] -> [k, r, rows, d]; a view where r is 1."""
        rows = x[self.queries.start - self.first_query : self.queries.stop - self.first_query, self.sample]
        return torch.unflatten(rows[:, self.query_heads.start : self.query_heads.stop], 1, (-1, self.shared)).permute(
            1, 2, 0, 3
        )

    def put(self, x: Tensor, rows: Tensor) -> None:
        """Write [k, r, rows, d] to where it belongs in [s, b, n, d]."""
        self.rows_of(x).copy_(rows)

    def add_rows(self, x: Tensor, rows: Tensor) -> None:
        """Add [k, r, rows, d] to where it belongs in [s, b, n, d]."""
        self.rows_of(x).add_(rows)

    def _stretches(self) -> list[slice]:
        return [slice(part.start - self.first_key, part.stop - self.first_key) for part in self.keys]

    def keys_of(self, x: Tensor) -> Tensor:
        """[c, b, k, d] -> [k, keys, d]; a view where the keys are one stretch."""
        of_heads = x[:, self.sample, self.heads].transpose(0, 1)
        parts = [of_heads[:, at] for at in self._stretches()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def add_keys(self, x: Tensor, rows: Tensor) -> None:
        """Add [k, keys, d] to where it belongs in [c, b, k, d]."""
        of_heads = x[:, self.sample, self.heads].transpose(0, 1)
        for at, some in zip(self._stretches(), torch.split(rows, [len(part) for part in self.keys], 1), strict=True):
            of_heads[:, at] += some

    def scores(self, q: Tensor, keys: Tensor, span: Span) -> Tensor:
        """Return the scores of the keys that are seen, -inf for others: [k, r, rows, keys]."""
        rows = self.rows_of(q).flatten(1, 2)
        scores = torch.bmm(rows, keys.transpose(1, 2)).mul_(span.seen.scale_of(q))
        scores = scores.view(len(rows), self.shared, len(self.queries), -1)
        if span.seen.bias is not None:
            scores += self.bias(span.seen.bias, span.seen.first_distance()).to(scores.dtype)
        hidden = self.hidden(span, q.device)
        return scores if hidden is None else scores.masked_fill_(hidden, -torch.inf)

    def hidden(self, span: Span, device: torch.device) -> Tensor | None:
        """Say which keys are hidden from which query, [rows, keys]; None if none is."""
        hidden = None
        if not all(span.seen.sees_all(self.queries, part) for part in self.keys):
            queries = torch.arange(self.queries.start, self.queries.stop, device=device)
            keys = torch.cat([torch.arange(part.start, part.stop, device=device) for part in self.keys])
            hidden = ~span.seen.mask(queries, keys)
        if span.of_queries is not None and span.of_keys is not None:
            begin, end = self.queries.start - self.first_query, self.queries.stop - self.first_query
            theirs = torch.cat([span.of_keys[at, self.sample] for at in self._stretches()])
            foreign = span.of_queries[begin:end, self.sample, None] != theirs
            hidden = foreign if hidden is None else hidden | foreign
        return hidden

    def factors(self, span: Span, like: Tensor) -> Tensor:
        """Return the factors of dropout, [k, r, rows, keys]."""
        assert span.seen.drop is not None
        drop = span.seen.drop
        parts = [drop.factors(self.sample, self.query_heads, self.queries, keys, like) for keys in self.keys]
        return torch.cat(parts, 2).view(like.shape)

    def _distances(self, keys: range) -> range:
        return range(self.queries.start - keys.stop + 1, self.queries.stop - keys.start)

    def bias(self, table: Tensor, first: int) -> Tensor:
        """[n, distances] -> [k, r, rows, keys]: row i, key j has that of i - j; beyond the table, where nothing is
        seen, the nearest."""
        mine, parts = table[self.query_heads.start : self.query_heads.stop], []
        for keys in self.keys:
            distances = self._distances(keys)
            # Falling distances: a stretch of len(keys) of them is the row of one query.
            index = torch.arange(distances.stop - 1, distances.start - 1, -1, device=table.device) - first
            falling = mine[:, index.clamp_(0, table.shape[1] - 1)]
            parts.append(falling.unfold(1, len(keys), 1).flip(1))
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        return torch.unflatten(whole, 0, (-1, self.shared))

    def add_bias(self, total: Tensor, d: Tensor, span: Span) -> None:
        """Add the gradients of scores, [k, r, rows, keys], to those of their distances, [n, distances]."""
        rows, first, mine = len(self.queries), span.seen.first_distance(), total[self.query_heads.start :]
        parts = torch.split(d.flatten(0, 1), [len(part) for part in self.keys], 2)
        for keys, some in zip(self.keys, parts, strict=True):
            # Each row one place further to the right than the one below: a column then holds one distance, falling.
            wide = F.pad(some.flip(1), (0, rows)).flatten(1)[:, : rows * (len(keys) + rows - 1)]
            falling = wide.view(len(some), rows, -1).sum(1)
            distances = self._distances(keys)
            low, high = max(distances.start, first), min(distances.stop, first + total.shape[1])
            rising = falling.flip(1)[:, low - distances.start : high - distances.start]
            mine[: len(some), low - first : high - first] += rising


def _tiles(q: Tensor, k: Tensor, span: Span) -> Iterator[_Tile]:
    (s, b, n), (c, _, num_kv_heads) = q.shape[:3], k.shape[:3]
    shared, seen = n // num_kv_heads, span.seen
    all_keys = range(span.first_key, span.first_key + c)
    most, times = (SCORES, 1) if q.device.type == "cpu" else (64 * SCORES, 16)
    if times == 1 and seen.window >= 4 * ROWS:
        times = 4
    width = c if not seen.window else min(c, 2 * seen.window + times * ROWS)
    most = min(most, span.entries)
    rows = max(1, min(times * ROWS, most // width))
    group = max(1, most // (rows * width * shared))
    for begin in range(0, s, rows):
        queries = range(span.first_query + begin, span.first_query + min(begin + rows, s))
        keys = seen.key_ranges(queries, all_keys)
        if not keys:
            continue
        for sample in range(b):
            for first in range(0, num_kv_heads, group):
                heads = slice(first, min(first + group, num_kv_heads))
                yield _Tile(sample, heads, shared, queries, keys, span.first_query, span.first_key)
