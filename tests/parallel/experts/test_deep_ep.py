"""The exchange by DeepEP against the all-to-all, with a stand-in for its buffer that keeps to its documented calls."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rank_pool import run_mesh
from torch import Tensor

from meshwright.parallel.collectives import exchange_counts, exchange_rows
from meshwright.parallel.experts.deep_ep import DeepEpExchange, why_not
from meshwright.parallel.experts.exchange import AllToAll
from meshwright.parallel.mesh import Axis, Mesh, Sizes

T, K, E, H = 7, 3, 4, 5


class StandIn:
    """What `deep_ep.ElasticBuffer` does, by gloo: a token goes once to each rank that has an expert of it."""

    def __init__(self, ep: Axis) -> None:
        self.ep = ep

    def dispatch(self, x: Tensor, handle: Any = None, **given: Any) -> tuple[Any, ...]:
        if handle is not None:
            return exchange_rows(x[handle.token], handle.send, handle.receive, self.ep), None, None, handle, None
        chosen, e_local = given["topk_idx"], given["num_experts"] // self.ep.size
        assert x.shape[0] <= given["num_max_tokens_per_rank"]
        goes = [(chosen // e_local == rank).any(1).nonzero()[:, 0] for rank in range(self.ep.size)]
        token = torch.cat(goes)
        send = [len(of_rank) for of_rank in goes]
        receive = exchange_counts(torch.tensor(send)[:, None], self.ep)[:, 0].tolist()
        handle = SimpleNamespace(token=token, send=send, receive=receive, tokens=x.shape[0])
        handle.psum_num_recv_tokens_per_scaleup_rank = torch.tensor(receive).cumsum(0)
        here = exchange_rows(chosen[token], send, receive, self.ep)
        first = self.ep.rank * e_local
        here = torch.where((here >= first) & (here < first + e_local), here - first, -1)
        rows = exchange_rows(x[token], send, receive, self.ep)
        weights = exchange_rows(given["topk_weights"][token], send, receive, self.ep)
        padded = [torch.cat([part, part.new_zeros(2, part.shape[1])]) for part in (rows, here, weights)]
        return *padded, handle, None

    def combine(self, x: Tensor, handle: Any, topk_weights: Tensor | None = None) -> tuple[Any, ...]:
        def summed(rows: Tensor) -> Tensor:
            back = exchange_rows(rows, handle.receive, handle.send, self.ep)
            return rows.new_zeros(handle.tokens, rows.shape[1]).index_add_(0, handle.token, back)

        return summed(x), None if topk_weights is None else summed(topk_weights), None


def errors(mesh: Mesh, drops: bool) -> list[float]:
    generator = torch.Generator().manual_seed(mesh.rank)
    x, above = torch.randn(2, T, H, generator=generator)
    expert = torch.rand(T, E, generator=generator).argsort(1)[:, :K]
    weight = torch.rand(T, K, generator=generator)
    taken = torch.rand(T, K, generator=generator) < 0.6 if drops else None
    deep = DeepEpExchange(E, mesh.ep, dtype=torch.float32)
    deep._buffer, deep._room = StandIn(mesh.ep), T
    found = []
    for exchange in (AllToAll(E, mesh.ep), deep):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        rows, counts, sent = exchange.send(leaves[0], expert, leaves[1], taken)
        own = torch.arange(E // mesh.ep.size) + mesh.ep.rank * (E // mesh.ep.size)
        scale = (own + 1.5).repeat_interleave(counts)[:, None]
        y = exchange.bring_back(torch.tanh(rows * scale), sent)
        y.backward(above)
        found.append((y, *(leaf.grad for leaf in leaves)))
    return [(one - other).abs().max().item() for one, other in zip(*found, strict=True)]


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("ep", [2, 4])
def test_results_and_gradients_are_those_of_the_all_to_all(ep: int, drops: bool) -> None:
    for found in run_mesh(Sizes(dp_shard=ep, ep=ep), errors, drops):
        assert max(found) < 1e-5  # fp32 sums of three terms in another order


def test_it_says_why_it_cannot_be_used_here() -> None:
    assert why_not(torch.device("cpu")) == "DeepEP runs on NVIDIA GPUs, and this rank is on cpu"
    assert "deep_ep is not installed" in why_not(torch.device("cuda"))
