"""Attention to a part of the keys by the flash operators of CUDA, which take no mask: by pieces of documents.

The operator for sequences of different lengths gets each run of queries with the keys that it sees, in one call.
Documents of one sample, queries at positions 4 to 7, keys at 0 to 3 (a chunk that comes before):

    keys     a a b b      queries   b b c c        pieces   queries b b x keys b b
                                                            queries c c see nothing: out 0, lse -inf
    causal, keys = queries:   a a b b              pieces   a a x a a,  b b x b b, each causal

A document is one run of neighbouring positions, and later ones have higher ids; samples differ, so pieces are made of
[b * s] rows, sample after sample. This file knows torch's private operators and their layouts:

    dense     q [b, s, n, d]   lse [b, n, s]
    varlen    q [t, n, d]      lse [n, t]        begins of the pieces in t, with t itself at the end, in int32

The head's width is padded to a multiple of 8, which the operators want; a feature of zeros changes no score.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_forward = torch.ops.aten._flash_attention_forward
_backward = torch.ops.aten._flash_attention_backward

By = tuple[bool, Tensor | None, Tensor | None]
"""Whether it is causal, and the documents of the queries and keys."""


class Pieces(NamedTuple):
    """Which rows of [b * s] go into the operator, piece by piece."""

    query_rows: Tensor
    key_rows: Tensor
    query_begins: Tensor
    key_begins: Tensor
    longest_query: int
    longest_key: int


def pieces_of(of_queries: Tensor, of_keys: Tensor) -> Pieces:
    """Pair each run of queries of one document, [s, b], with the run of keys of the same document, [c, b].

    Raises:
        ValueError: if a document's id is lower than that of a document before it, so that it may be no single run.
    """
    if bool(torch.stack([(x[1:] < x[:-1]).any() for x in (of_queries, of_keys)]).any()):
        raise ValueError("document ids fall along a sequence; give later documents higher ids")
    rows, ids = [], []
    span = int(torch.maximum(of_queries.max(), of_keys.max()).item()) + 1
    for document in (of_queries, of_keys):
        samples = torch.arange(document.shape[1], device=document.device)[:, None]
        ids.append((document.T + samples * span).flatten())  # a document of another sample is another document
    for mine, others in (ids, ids[::-1]):
        rows.append(torch.isin(mine, others).nonzero()[:, 0])
    lengths = [torch.unique_consecutive(x[row], return_counts=True)[1] for x, row in zip(ids, rows, strict=True)]
    begins = [F.pad(length.cumsum(0), (1, 0)).to(torch.int32) for length in lengths]
    longest = [int(length.max().item()) if len(length) else 0 for length in lengths]
    return Pieces(rows[0], rows[1], begins[0], begins[1], longest[0], longest[1])


def forward(q: Tensor, k: Tensor, v: Tensor, by: By, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Return out [s, b, n, d] and lse [s, b, n]; scores are multiplied by `scale`, by default 1 / sqrt(d)."""
    is_causal, of_queries, of_keys = by
    d = q.shape[3]
    scale = d**-0.5 if scale is None else scale
    wide_q, wide_k, wide_v = (_pad(x).transpose(0, 1) for x in (q, k, v))
    if of_queries is None or of_keys is None:
        out, lse, *_ = _forward(
            wide_q, wide_k, wide_v, None, None, q.shape[0], k.shape[0], 0.0, is_causal, False, scale=scale
        )
        return out[..., :d].transpose(0, 1), lse.permute(2, 0, 1)
    at = pieces_of(of_queries, of_keys)
    flat = torch.zeros_like(wide_q).flatten(0, 1)
    flat_lse = q.new_full((flat.shape[0], q.shape[2]), -torch.inf, dtype=torch.float32)
    if len(at.query_rows):
        some, lse, *_ = _forward(*_of_pieces(at, wide_q, wide_k, wide_v), *at[2:], 0.0, is_causal, False, scale=scale)
        flat[at.query_rows] = some
        flat_lse[at.query_rows] = lse.T
    out = flat.view(wide_q.shape)[..., :d].transpose(0, 1)
    return out, flat_lse.view(wide_q.shape[:3]).transpose(0, 1)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    results: tuple[Tensor, Tensor],
    by: By,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what these keys add to the gradients of q, k and v, sequence first; `results` are out and lse."""
    is_causal, of_queries, of_keys = by
    (whole_out, lse), d = results, q.shape[3]
    scale = d**-0.5 if scale is None else scale
    wide = [_pad(x).transpose(0, 1).contiguous() for x in (grad, q, k, v, whole_out)]
    unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.zeros((), dtype=torch.uint64, device=q.device)
    if of_queries is None or of_keys is None:
        lse = lse.permute(1, 2, 0).contiguous()
        sizes = (None, None, q.shape[0], k.shape[0])
        found = _backward(*wide, lse, *sizes, 0.0, is_causal, *unused, scale=scale)
        of_q, of_k, of_v = (x[..., :d].transpose(0, 1) for x in found)
        return of_q, of_k, of_v
    at = pieces_of(of_queries, of_keys)
    found_rows = [torch.zeros_like(x).flatten(0, 1) for x in wide[1:4]]
    if len(at.query_rows):
        some_grad, some_out = (x.flatten(0, 1)[at.query_rows] for x in (wide[0], wide[4]))
        some_lse = lse.transpose(0, 1).flatten(0, 1)[at.query_rows].T.contiguous()
        given = (some_grad, *_of_pieces(at, *wide[1:4]), some_out, some_lse)
        found = _backward(*given, *at[2:], 0.0, is_causal, *unused, scale=scale)
        for result, rows, some in zip(found_rows, (at.query_rows, at.key_rows, at.key_rows), found, strict=True):
            result[rows] = some
    of_q, of_k, of_v = (
        x.view(like.shape)[..., :d].transpose(0, 1) for x, like in zip(found_rows, wide[1:4], strict=True)
    )
    return of_q, of_k, of_v


def _of_pieces(at: Pieces, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows of the pieces, [t, heads, d]."""
    return q.flatten(0, 1)[at.query_rows], k.flatten(0, 1)[at.key_rows], v.flatten(0, 1)[at.key_rows]


def _pad(x: Tensor) -> Tensor:
    return F.pad(x, (0, -x.shape[-1] % 8))
