"""Small stages for the tests of a pipeline, and a 1F1B written by hand: the judge of torch's schedules."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshwright.parallel.mesh import Axis

SHAPE = (2, 1, 3)


class Part(nn.Module):
    """A stage of a few numbers: a product and a sine, a sum at the end."""

    def __init__(self, stage: int, count: int) -> None:
        super().__init__()
        self.is_last = stage == count - 1
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5 + stage, 3, dtype=torch.float64))

    def forward(self, *before: Tensor, number: Tensor) -> Tensor:
        x = before[0] if before else torch.arange(6.0, dtype=torch.float64).reshape(SHAPE) + number.double()
        x = torch.sin(x * self.weight)
        return x.sum().reshape(1) if self.is_last else x


def one_forward_one_backward(parts: list[Part], pp: Axis, micro_batches: int) -> Tensor:
    """Run a step of 1F1B over ranks that each hold some stages in a row; return the summed loss of the last."""
    before = pp.rank - 1 if pp.rank > 0 else None
    after = pp.rank + 1 if pp.rank < pp.size - 1 else None
    waiting: list[tuple[Tensor | None, Tensor]] = []
    total, begun = torch.zeros((), dtype=torch.float64), 0

    def exchange(*, sent: Tensor | None = None, to: int | None = None, source: int | None = None) -> Tensor | None:
        """Send and receive at once, as NCCL needs it where both neighbours send to each other."""
        calls, buffer = [], None
        if sent is not None and to is not None:
            calls.append(dist.P2POp(dist.isend, sent.contiguous(), pp.ranks[to], pp.group))
        if source is not None:
            buffer = torch.empty(SHAPE, dtype=torch.float64)
            calls.append(dist.P2POp(dist.irecv, buffer, pp.ranks[source], pp.group))
        for work in dist.batch_isend_irecv(calls) if calls else []:
            work.wait()
        return buffer

    def forward(taken: Tensor | None) -> Tensor | None:
        nonlocal begun, total
        x = taken if taken is None else taken.requires_grad_()
        taken = x
        for part in parts:
            x = part(*([] if x is None else [x]), number=torch.tensor([begun]))
        assert x is not None
        begun += 1
        waiting.append((taken, x))
        if after is None:
            total = total + x.detach().sum()
        return x.detach()

    def backward(gradient: Tensor | None) -> Tensor | None:
        taken, made = waiting.pop(0)
        made.backward(gradient)
        return None if taken is None else taken.grad

    warm_up = min(pp.size - 1 - pp.rank, micro_batches)
    for _ in range(warm_up):
        exchange(sent=forward(exchange(source=before)), to=after)
    taken = exchange(source=before) if micro_batches > warm_up else None
    for number in range(warm_up, micro_batches):
        gradient = exchange(sent=forward(taken), to=after, source=after)
        is_last = number == micro_batches - 1
        taken = exchange(sent=backward(gradient), to=before, source=None if is_last else before)
    for _ in range(warm_up):
        exchange(sent=backward(exchange(source=after)), to=before)
    return total
