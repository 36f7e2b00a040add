"""A mixer by itself, held to itself: on a mesh as on one process (output, all gradients), by steps as all at once.

What can be asked for in a config is held so as a whole model (part_samples.py); here is what cannot, or is rarely.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshwright.model.parts import initialise
from meshwright.parallel.context.order import zigzag_part, zigzag_positions
from meshwright.parallel.initialise import init_rules
from meshwright.parallel.mesh import Axis, Mesh, single_process_mesh
from meshwright.parallel.placement import placement_table
from meshwright.parallel.where import Where, place

F64 = torch.float64
Make = Callable[[Mesh], nn.Module]


def built(make: Make, mesh: Mesh | None = None, seed: int = 5) -> nn.Module:
    """Return a mixer in fp64 with the same weights on every mesh, none of them at 0 or 1."""
    part = make(mesh or single_process_mesh()).to(F64)
    initialise(part, seed)
    table, rules = placement_table(part), init_rules(part)
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            if rules[name].kind == "constant":  # norms, biases
                held, shape = table[name], tuple(parameter.shape)
                whole = held.global_shape(shape)
                generator = torch.Generator().manual_seed(len(name))
                values = 1.0 + 0.5 * torch.randn(whole, generator=generator, dtype=F64)
                parameter.copy_(_part_of(values, held.offset(shape), shape))
    return part


def _part_of(whole: Tensor, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    for dim, (begin, size) in enumerate(zip(offset, shape, strict=True)):
        whole = whole.narrow(dim, begin, size)
    return whole


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter random numbers of an ordinary size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=F64))
    return module


def documents(seq_len: int) -> Tensor:
    """Return two samples of documents; the second has one that ends with its first token, and a long one."""
    first, second = torch.zeros(seq_len, dtype=torch.int64), torch.zeros(seq_len, dtype=torch.int64)
    for start in (3, 4, seq_len // 2, seq_len - 2):
        first[start:] += 1
    second[1:] += 1
    second[seq_len - 5 :] += 3
    return torch.stack([first, second], 1)


def where_of(document: Tensor, mesh: Mesh, *, by_document: bool = True) -> Where:
    """Return the place of these documents' tokens on a rank."""
    s, b = document.shape
    positions = zigzag_positions(s, mesh.cp)
    counted = torch.ones(s, b, dtype=torch.bool)
    more = {"step": 3, "step_tokens": float(s * b), "seed": 11, "mask_documents": by_document}
    return place(torch.arange(b) + 7, document, counted, positions, mesh.tp, **more)


def errors_on(mesh: Mesh, make: Make, x: Tensor, document: Tensor, by_document: bool, train: bool) -> dict[str, float]:
    """Return how far output and gradients of this rank are from those on one process, relative to the largest."""
    one = single_process_mesh()
    grad = torch.randn(x.shape, dtype=F64, generator=torch.Generator().manual_seed(2))
    whole, mine = built(make).train(train), built(make, mesh).train(train)

    def cut(tensor: Tensor) -> Tensor:
        return zigzag_part(tensor, mesh.cp).chunk(mesh.tp.size)[mesh.tp.rank]

    x_whole, x_mine = x.clone().requires_grad_(), cut(x).clone().requires_grad_()
    y_whole = whole(x_whole, where_of(document, one, by_document=by_document), None)
    y_mine = mine(x_mine, where_of(document, mesh, by_document=by_document), None)
    y_whole.backward(grad)
    y_mine.backward(cut(grad))
    found = {"output": _error(y_mine, cut(y_whole)), "x": _error(x_mine.grad, cut(x_whole.grad))}
    table, wanted = placement_table(mine), dict(whole.named_parameters())
    for name, parameter in mine.named_parameters():
        held, total = table[name], parameter.grad.clone()
        for axis in (*held.grad_sum, mesh.cp):
            _sum(total, axis)
        shape = tuple(parameter.shape)
        found[name] = _error(total, _part_of(wanted[name].grad, held.offset(shape), shape))
    return found


def _sum(x: Tensor, axis: Axis) -> None:
    if axis.is_split:
        dist.all_reduce(x, group=axis.group)


def _error(ours: Tensor, theirs: Tensor) -> float:
    largest = theirs.abs().max().item()
    return (ours - theirs).abs().max().item() / (largest if largest > 1e-12 else 1.0)


def too_far(found: list[dict[str, float]], bound: float = 1e-9) -> dict[str, float]:
    """Return what is further from one process's than the bound, on any rank."""
    return {f"{at}: {key}": error for at, rank in enumerate(found) for key, error in rank.items() if not error <= bound}


def assert_steps_are_the_whole(part: nn.Module, x: Tensor, cuts: list[int], max_len: int | None = None) -> Any:
    """Feed the tokens in pieces, and compare with all at once; into room for them, and into room that grows."""
    document = torch.zeros(x.shape[:2], dtype=torch.int64)
    part.eval()
    with torch.no_grad():
        wanted = part(x, where_of(document, single_process_mesh(), by_document=False), None)
        state, growing = part.initial_state(x.shape[1], max_len or len(x)), part.initial_state(x.shape[1])
        pieces = torch.cat([part.step(piece, state) for piece in torch.split(x, cuts)])
        grown = torch.cat([part.step(piece, growing) for piece in torch.split(x, cuts)])
    torch.testing.assert_close(pieces, wanted)
    assert torch.equal(grown, pieces)
    return state


def assert_documents_do_not_leak(part: nn.Module, x: Tensor, document: Tensor) -> None:
    """Change one document of one sample, and see no other token change."""
    part.eval()
    where = where_of(document, single_process_mesh(), by_document=True)
    with torch.no_grad():
        before = part(x, where, None)
        changed = x.clone()
        changed[document[:, 0] == document[-1, 0] - 1, 0] += 1.0
        after = part(changed, where_of(document, single_process_mesh(), by_document=True), None)
    moved = (after - before).abs().amax(2) > 1e-12
    assert moved[:, 0].any()
    assert not moved[:, 1:].any()
    assert torch.equal(moved[:, 0] & (document[:, 0] != document[-1, 0] - 1), torch.zeros(len(x), dtype=torch.bool))
