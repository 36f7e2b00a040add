"""Dispatch and combine against a plain loop over tokens, their choices and the experts, with gradients."""

import pytest
import torch
from rank_pool import run_mesh
from torch import Tensor

from meshwright.parallel.experts.exchange import combine, dispatch, return_rows, share_rows
from meshwright.parallel.mesh import Axis, Mesh, Sizes, single_process_mesh

T, K, E, H = 7, 2, 4, 3


def scaled(rows: Tensor, counts: Tensor, matrices: Tensor) -> Tensor:
    """Stand in for the experts: row times its expert's matrix."""
    stretches = rows.split(counts.tolist())
    return torch.cat([stretch @ matrix for stretch, matrix in zip(stretches, matrices, strict=True)])


def choices(kind: str, rank: int) -> Tensor:
    if kind == "uneven":
        return torch.rand(T, E, generator=torch.Generator().manual_seed(rank)).argsort(1)[:, :K]
    if kind == "expert 1 has none":
        return torch.tensor([0, 2, 3])[torch.rand(T, 3, generator=torch.Generator().manual_seed(rank)).argsort(1)][
            :, :K
        ]
    if kind == "all to expert 2":
        return torch.full((T, 1), 2)
    assert kind == "a rank without tokens"
    return choices("uneven", rank)[: 0 if rank == 0 else T]


def inputs(kind: str, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + rank)
    expert = choices(kind, rank)
    x = torch.randn(len(expert), H, dtype=torch.float64, generator=generator)
    weight = torch.rand(expert.shape, dtype=torch.float64, generator=generator)
    return x, expert, weight


def all_matrices() -> Tensor:
    return torch.randn(E, H, H, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def by_loop(kind: str, ranks: int) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Return each rank's result and gradients of x and weight, and the gradient of all experts' matrices."""
    matrices = all_matrices().requires_grad_()
    results, of_x, of_weight = [], [], []
    for rank in range(ranks):
        x, expert, weight = inputs(kind, rank)
        x.requires_grad_()
        weight.requires_grad_()
        rows = []
        for token in range(len(x)):
            total = torch.zeros(H, dtype=torch.float64)
            for choice in range(expert.shape[1]):
                total = total + weight[token, choice] * (x[token] @ matrices[expert[token, choice]])
            rows.append(total)
        y = torch.stack(rows) if rows else 0 * x
        (y * (rank + 1)).square().sum().backward()
        results.append(y.detach())
        of_x.append(x.grad)
        of_weight.append(weight.grad if rows else torch.zeros_like(weight))
    return results, of_x, of_weight, matrices.grad


def through_the_exchange(mesh: Mesh, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    ep = mesh.ep
    x, expert, weight = inputs(kind, mesh.rank)
    x.requires_grad_()
    weight.requires_grad_()
    mine = all_matrices().chunk(ep.size)[ep.rank].clone().requires_grad_()
    rows, plan = dispatch(x, expert, E, ep)
    assert plan.counts.sum() == len(rows)
    y = combine(scaled(rows, plan.counts, mine), weight, plan, ep)
    (y * (mesh.rank + 1)).square().sum().backward()
    return y.detach(), x.grad, weight.grad, mine.grad, plan.counts.tolist()


@pytest.mark.parametrize("kind", ["uneven", "expert 1 has none", "all to expert 2", "a rank without tokens"])
@pytest.mark.parametrize("ep", [1, 2, 4])
def test_every_token_reaches_its_experts_and_comes_back(ep: int, kind: str) -> None:
    if ep == 1 and kind == "a rank without tokens":
        pytest.skip("one rank without tokens has no one to exchange with")
    found = [through_the_exchange(single_process_mesh(), kind)]
    if ep > 1:
        found = run_mesh(Sizes(dp_shard=ep, ep=ep), through_the_exchange, kind)
    results, of_x, of_weight, of_matrices = by_loop(kind, ep)
    for rank, (y, x_grad, weight_grad, matrix_grad, counts) in enumerate(found):
        torch.testing.assert_close(y, results[rank])
        torch.testing.assert_close(x_grad, of_x[rank])
        torch.testing.assert_close(weight_grad, of_weight[rank])
        torch.testing.assert_close(matrix_grad, of_matrices.chunk(ep)[rank])
        everyones = torch.cat([choices(kind, source).flatten() for source in range(ep)])
        assert counts == torch.bincount(everyones, minlength=E).chunk(ep)[rank].tolist()


def test_rows_of_one_expert_stand_in_token_order() -> None:
    expert = torch.tensor([[1, 0], [0, 1], [1, 2]])
    rows, plan = dispatch(torch.arange(3.0)[:, None].expand(-1, 2).contiguous(), expert, 3, Axis("ep"))
    assert rows[:, 0].tolist() == [0, 1, 0, 1, 2, 2]
    assert plan.counts.tolist() == [2, 3, 1]


def bitwise_twice(mesh: Mesh) -> bool:
    first, second = through_the_exchange(mesh, "uneven"), through_the_exchange(mesh, "uneven")
    return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(first, second, strict=True))


def test_the_exchange_is_bitwise_the_same_each_time() -> None:
    assert run_mesh(Sizes(dp_shard=2, ep=2), bitwise_twice) == [True, True]


def test_experts_that_ep_does_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="num_experts = 4 does not divide by ep = 3"):
        dispatch(torch.zeros(1, H), torch.zeros(1, 1, dtype=torch.int64), 4, Axis("ep", 3))


def test_weights_of_another_type_keep_the_rows_type() -> None:
    x, expert, weight = inputs("uneven", 0)
    rows, plan = dispatch(x.bfloat16(), expert, E, Axis("ep"))
    assert combine(rows, weight.to(torch.float32), plan, Axis("ep")).dtype == torch.bfloat16


def shared_and_back(mesh: Mesh, counts_by_rank: list[list[int]]) -> tuple[float, float, list[int]]:
    """Square every row on both ranks of etp, each giving half of the sum."""
    etp, counts = mesh.etp, torch.tensor(counts_by_rank[mesh.etp.rank])
    generator = torch.Generator().manual_seed(mesh.etp.rank)
    rows = torch.randn(int(counts.sum()), 3, dtype=torch.float64, generator=generator).requires_grad_()
    shared = share_rows(rows, counts, etp)
    y = return_rows(shared.rows.square() / etp.size, shared, etp)
    above = torch.randn(rows.shape, dtype=torch.float64, generator=generator)
    y.backward(above)
    assert rows.grad is not None
    of_gradient = (rows.grad - 2 * rows.detach() * above).abs().max() if len(rows) else torch.zeros(())
    of_y = (y - rows.square()).abs().max() if len(rows) else torch.zeros(())
    return of_y.item(), of_gradient.item(), shared.counts.tolist()


@pytest.mark.parametrize("counts", [[[2, 0, 3], [1, 4, 0]], [[0, 0, 0], [2, 2, 2]], [[0, 0, 0], [0, 0, 0]]])
def test_rows_shared_over_etp_come_back_to_their_rank(counts: list[list[int]]) -> None:
    # The gather is padded to the longest rank: what stands behind the shorter one's rows reaches nobody (S7).
    for of_y, of_gradient, together in run_mesh(Sizes(dp_shard=2, etp=2), shared_and_back, counts):
        assert max(of_y, of_gradient) < 1e-12
        assert together == [sum(of_expert) for of_expert in zip(*counts, strict=True)]
