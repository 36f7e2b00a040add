"""What each chunk of a sample needs of those before it: tokens, states, starts of documents; and its gradients."""

import pytest
import torch
from mixer_parity import documents, where_of
from rank_pool import run_mesh
from torch import Tensor

from meshwright.parallel.collectives import gather
from meshwright.parallel.context.order import chunks_of, zigzag_part
from meshwright.parallel.mesh import NO_CP, Mesh, Sizes, single_process_mesh
from meshwright.parallel.sequence_state import document_begins, halos, scale_state, states_before

S, B = 24, 2


def tokens() -> Tensor:
    return torch.randn(S, B, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def of_halos(mesh: Mesh, width: int, mask_documents: bool) -> list[float]:
    """Return how far the halos and the gradients of the tokens are from what the whole sample says."""
    where, whole = where_of(documents(S), mesh, by_document=mask_documents), tokens().requires_grad_()
    mine = zigzag_part(whole.detach(), mesh.cp).requires_grad_()
    found = halos([mine[..., :2], mine[..., 2:]], width, mesh.cp, where)
    length, apart, total = S // (2 * mesh.cp.size), [], torch.zeros((), dtype=torch.float64)
    for chunk, (first, second) in zip(chunks_of(mesh.cp.rank, mesh.cp.size), found, strict=True):
        got = torch.cat([first, second], -1)
        apart.append((got - wanted_halo(whole, chunk * length, width, mask_documents)).abs().max().item())
        total = total + (got * (chunk + 1)).sum()
    total.backward()
    wanted = [wanted_halo(whole, chunk * length, width, mask_documents) for chunk in range(2 * mesh.cp.size)]
    everything = [(halo * (chunk + 1)).sum() for chunk, halo in enumerate(wanted)]
    torch.stack(everything).sum().backward()
    assert mine.grad is not None
    assert whole.grad is not None
    return [*apart, (mine.grad - zigzag_part(whole.grad, mesh.cp)).abs().max().item()]


def wanted_halo(whole: Tensor, begin: int, width: int, mask_documents: bool) -> Tensor:
    document = documents(S)
    rows = []
    for position in range(begin - width, begin):
        if position < 0:
            rows.append(torch.zeros_like(whole[0]))
            continue
        same = document[position] == document[begin - 1]
        rows.append(whole[position] * (same[:, None] if mask_documents else 1))
    return torch.stack(rows)


@pytest.mark.parametrize("cp", [2, 3])
@pytest.mark.parametrize("width", [3, 9])  # 9 is more than a chunk
@pytest.mark.parametrize("mask_documents", [True, False])
def test_a_halo_is_the_tokens_before_a_chunk_in_its_document(cp: int, width: int, mask_documents: bool) -> None:
    for found in run_mesh(Sizes(cp=cp), of_halos, width, mask_documents):
        assert max(found) == 0.0


def fold(mesh: Mesh) -> list[float]:
    """Compare the states before this rank's chunks, and the gradients of all, with a fold on one process."""
    generator, chunks = torch.Generator().manual_seed(2), 2 * mesh.cp.size
    decay, state = (
        torch.rand(chunks, B, 3, *more, dtype=torch.float64, generator=generator).requires_grad_()
        for more in ((), (2, 4))
    )
    wanted, h = [], torch.zeros(B, 3, 2, 4, dtype=torch.float64)
    for chunk in range(chunks):
        wanted.append(h)
        h = decay[chunk][..., None, None] * h + state[chunk]
    sum((chunk + 1) * each.square().sum() for chunk, each in enumerate(wanted)).backward()

    held = chunks_of(mesh.cp.rank, mesh.cp.size)
    mine = [tuple(x.detach()[chunk].requires_grad_() for x in (decay, state)) for chunk in held]
    found = states_before(mine, mesh.cp, scale_state)
    sum((chunk + 1) * each.square().sum() for chunk, each in zip(held, found, strict=True)).backward()
    apart = [(each - wanted[chunk]).abs().max().item() for chunk, each in zip(held, found, strict=True)]
    for chunk, tensors in zip(held, mine, strict=True):
        for ours, whole in zip(tensors, (decay, state), strict=True):
            apart.append((ours.grad - whole.grad[chunk]).abs().max().item())
    return apart


@pytest.mark.parametrize("cp", [2, 3])
def test_each_chunk_begins_with_what_all_before_it_leave(cp: int) -> None:
    for found in run_mesh(Sizes(cp=cp), fold):
        assert max(found) < 1e-12


def calls(mesh: Mesh) -> int:
    from unittest.mock import patch

    with patch("meshwright.parallel.sequence_state.gather", wraps=gather) as counted:
        states_before([(torch.ones(B, 3), torch.ones(B, 3, 2, 4))] * 2, mesh.cp, scale_state)
        return counted.call_count


def test_the_states_of_all_chunks_come_in_one_gather() -> None:
    assert run_mesh(Sizes(cp=2), calls) == [1, 1]


def test_documents_begin_where_their_number_changes() -> None:
    begins = document_begins(where_of(documents(S), single_process_mesh()), NO_CP)
    assert begins is not None
    assert begins[:, 0].nonzero().flatten().tolist() == [3, 4, 12, 22]
    assert begins[:, 1].nonzero().flatten().tolist() == [1, 19]
    assert document_begins(where_of(documents(S), single_process_mesh(), by_document=False), NO_CP) is None
