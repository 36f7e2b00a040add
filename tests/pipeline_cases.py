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
    is_first, is_last = pp.rank == 0, pp.rank == pp.size - 1
    waiting: list[tuple[Tensor | None, Tensor]] = []
    sending: list[tuple[dist.Work | None, Tensor]] = []  # both neighbours may send at once, so nobody waits for it
    total, begun = torch.zeros((), dtype=torch.float64), 0

    def receive(rank: int) -> Tensor:
        buffer = torch.empty(SHAPE, dtype=torch.float64)
        dist.recv(buffer, pp.ranks[rank], group=pp.group)
        return buffer

    def send(tensor: Tensor, rank: int) -> None:
        sending.append((dist.isend(tensor, pp.ranks[rank], group=pp.group), tensor))

    def forward() -> None:
        nonlocal begun, total
        taken = None if is_first else receive(pp.rank - 1).requires_grad_()
        x = taken
        for part in parts:
            x = part(*([] if x is None else [x]), number=torch.tensor([begun]))
        if is_last:
            total = total + x.detach().sum()
        else:
            send(x.detach(), pp.rank + 1)
        waiting.append((taken, x))
        begun += 1

    def backward() -> None:
        taken, made = waiting.pop(0)
        made.backward(None if is_last else receive(pp.rank + 1))
        if taken is not None:
            send(taken.grad, pp.rank - 1)

    for _ in range(min(pp.size - 1 - pp.rank, micro_batches)):
        forward()
    while begun < micro_batches:
        forward()
        backward()
    while waiting:
        backward()
    for work, _ in sending:
        assert work is not None
        work.wait()
    return total
