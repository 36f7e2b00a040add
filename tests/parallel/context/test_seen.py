"""Windows, biases, dropout and other widths over cp are the same attention on one process: outputs and gradients."""

import pytest
import torch
from rank_pool import run_ranks
from torch import Tensor

from meshwright.kernels import reference
from meshwright.kernels.attention.seen import Blocks, Seen
from meshwright.parallel.context.attend import context_attention
from meshwright.parallel.context.order import Documents, pairs, zigzag_part
from meshwright.parallel.mesh import Axis

S, B, N, K, D = 24, 2, 6, 2, 4
F64 = torch.float64
KINDS = {
    "to both sides": Seen(False),
    "scale": Seen(scale=0.3),
    "window 1": Seen(window=1),
    "window 5": Seen(window=5, scale=0.7),
    "window to both sides": Seen(False, window=7),
    "window and bias": Seen(window=9, bias=torch.zeros(0)),
    "bias": Seen(bias=torch.zeros(0)),
    "bias to both sides": Seen(False, bias=torch.zeros(0)),
    "dropout": Seen(drop=True),
}


class Parity:
    """Drops by the places alone."""

    def __init__(self, first: int = 0) -> None:
        self.first = first

    def from_head(self, first: int) -> "Parity":
        return Parity(self.first + first)

    def factors(self, sample: int, heads: range, queries: range, keys: range, like: Tensor) -> Tensor:
        h, i, j = torch.meshgrid(*(torch.arange(x.start, x.stop) for x in (heads, queries, keys)), indexing="ij")
        return ((5 * (h + self.first) + 7 * i + 3 * j + sample) % 3 != 0).to(like.dtype) * 1.5


def errors(cp: Axis, way: str, kind: str, by_document: bool, value_width: int) -> dict[str, float]:
    """Return how far this rank's output and gradients are from the twin's; a bias's gradient is a part of the sum."""
    torch.manual_seed(3)
    seen = KINDS[kind]
    whole = [torch.randn(S, B, heads, d, dtype=F64).requires_grad_() for heads, d in ((N, D), (K, D), (K, value_width))]
    if seen.bias is not None:
        table = torch.randn(N, S if seen.is_causal else 2 * S - 1, dtype=F64).requires_grad_()
        whole, seen = [*whole, table], seen._replace(bias=table)
    if seen.drop is not None:
        seen = seen._replace(drop=Parity())
    document = (torch.arange(S)[:, None] >= torch.tensor([5, 17])).long() if by_document else None
    wanted = reference.attention(*whole[:3], seen, document=document)
    grad = torch.randn(S, B, N, value_width, dtype=F64)
    expected = torch.autograd.grad(wanted, whole, grad)

    held = [zigzag_part(x.detach(), cp).requires_grad_() for x in whole[:3]]
    result = context_attention(*held, cp, way, Documents(document), seen)
    found = torch.autograd.grad(result, [*held, *whole[3:]], zigzag_part(grad, cp))
    pairs_of = {"output": (result, zigzag_part(wanted, cp))}
    for name, ours, theirs in zip(("q", "k", "v"), found, expected, strict=False):
        pairs_of[name] = (ours, zigzag_part(theirs, cp))
    if len(found) == 4:
        of_table = found[3].clone()
        if cp.is_split:
            torch.distributed.all_reduce(of_table, group=cp.group)
        pairs_of["bias"] = (of_table, expected[3])
    largest = {name: b.abs().max().item() for name, (_, b) in pairs_of.items()}
    scale = {name: size if size > 1e-9 else 1.0 for name, size in largest.items()}
    return {name: (a - b).abs().max().item() / scale[name] for name, (a, b) in pairs_of.items()}


def several(cp: Axis, way: str, kinds: list[str]) -> dict[str, float]:
    return {
        f"{kind}, {by_document}, {width}, {name}": error
        for kind in kinds
        for by_document in (False, True)
        for width in (D, 3)
        for name, error in errors(cp, way, kind, by_document, width).items()
    }


@pytest.mark.parametrize("way", ["ring", "ulysses"])
@pytest.mark.parametrize("cp", [2, 3])
def test_spread_attention_sees_what_one_process_sees(cp: int, way: str) -> None:
    for found in run_ranks(cp, several, way, list(KINDS)):
        assert {name: error for name, error in found.items() if not error <= 1e-9} == {}


def test_the_ring_skips_what_is_beyond_the_window() -> None:
    chunk = 10  # cp = 4: chunks 0 to 7, a window of 11 reaches into the chunk before alone
    met = [
        (rank, source, pair.chunks)
        for rank in range(4)
        for source in range(4)
        for pair in pairs(rank, source, 4, 2 * chunk, None, Seen(window=11))
    ]
    # Within its own chunk a token sees all before it, so that torch's operator does it.
    assert {chunks for _, _, chunks in met if chunks is not None} == {(at, at - 1) for at in range(1, 8)}
    assert len(met) == 15


def test_block_sparse_attention_refuses_cp_by_name() -> None:
    x = torch.zeros(4, 1, 2, 4)
    with pytest.raises(ValueError, match="block-sparse attention does not go over cp = 2; cp = 1, or a window, would"):
        context_attention(x, x, x, Axis("cp", 2), "ring", seen=Seen(blocks=Blocks(2, 1)))
