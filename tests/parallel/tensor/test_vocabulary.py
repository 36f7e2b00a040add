"""A vocabulary on several ranks gives one device's vectors, loss and gradients; its logits stay where they are."""

import pytest
import torch
import torch.nn.functional as F
from collective_calls import Call, watching
from rank_pool import run_mesh
from torch import Tensor

from meshwright.kernels.limits import Limits
from meshwright.kernels.matmul.cross_entropy import NOT_COUNTED
from meshwright.parallel import collectives
from meshwright.parallel.collectives import all_reduce
from meshwright.parallel.initialise import InitRule, fill
from meshwright.parallel.mesh import Mesh, Sizes
from meshwright.parallel.placement import without_padding
from meshwright.parallel.tensor.vocabulary import Embedding, VocabularyRows, next_token_loss

S, B, H, STEP_TOKENS = 8, 3, 5, 29.0
RULE = InitRule("normal", 1.0)


def rows_of(whole: Tensor, rows: VocabularyRows) -> Tensor:
    """Return the rank's rows of a whole matrix, padding as zeros."""
    held = rows.weight.shape[0]
    padded = F.pad(whole, (0, 0, 0, held * rows.tp.size - len(whole)))
    return padded.chunk(rows.tp.size)[rows.tp.rank].clone()


def inputs(v: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(v)
    weight = torch.randn(v, H, dtype=torch.float64, generator=generator)
    x = torch.randn(S, B, H, dtype=torch.float64, generator=generator) * 3
    tokens = torch.randint(0, v, (S, B), generator=generator)
    targets = torch.randint(0, v, (S, B), generator=generator)
    targets[-2:, 1] = NOT_COUNTED
    targets[:, 2] = NOT_COUNTED
    return weight, x, tokens, targets


def errors_of_loss(mesh: Mesh, v: int, chunk: int) -> tuple[float, float, float, float]:
    weight, x, _, targets = inputs(v)
    rows = VocabularyRows(v, H, rule=RULE, tp=mesh.tp)
    rows.weight.data = rows_of(weight, rows)
    held = x.chunk(mesh.tp.size)[mesh.tp.rank].clone().requires_grad_()
    share = next_token_loss(held, rows, targets, STEP_TOKENS, Limits(logits_on_cpu=chunk))
    (2 * share).backward()
    weight.requires_grad_()
    x.requires_grad_()
    expected = F.cross_entropy((x @ weight.T).flatten(0, 1), targets.flatten(), reduction="sum") / STEP_TOKENS
    (2 * expected).backward()
    loss = share.detach().clone()
    all_reduce(loss, mesh.tp)
    assert x.grad is not None
    assert weight.grad is not None
    assert held.grad is not None
    assert rows.weight.grad is not None
    of_x = (held.grad - x.grad.chunk(mesh.tp.size)[mesh.tp.rank]).abs().max()
    of_weight = (rows.weight.grad - rows_of(weight.grad, rows)).abs().max()
    mine = F.cross_entropy((x @ weight.T).flatten(0, 1), targets.flatten(), reduction="none").view(S, B)
    of_share = share - mine.chunk(mesh.tp.size)[mesh.tp.rank].sum() / STEP_TOKENS
    return (loss - expected).abs().item(), of_x.item(), of_weight.item(), of_share.abs().item()


@pytest.mark.parametrize(("tp", "v"), [(1, 13), (2, 12), (2, 13), (4, 13), (4, 9)])  # 9 over 4: the last has no row
@pytest.mark.parametrize("chunk", [1 << 20, 20])
def test_the_loss_and_its_gradients_are_those_of_a_whole_vocabulary(tp: int, v: int, chunk: int) -> None:
    for errors in run_mesh(Sizes(tp=tp), errors_of_loss, v, chunk):
        assert max(errors) < 1e-12


def errors_of_embedding(mesh: Mesh, v: int) -> tuple[float, float]:
    weight, x, tokens, _ = inputs(v)
    rows = Embedding(v, H, tp=mesh.tp)
    rows.weight.data = rows_of(weight, rows)
    weight.requires_grad_()
    expected = F.embedding(tokens, weight)
    expected.backward(x)
    y = rows(tokens)
    y.backward(x.chunk(mesh.tp.size)[mesh.tp.rank])
    assert rows.weight.grad is not None
    assert weight.grad is not None
    of_y = (y - expected.chunk(mesh.tp.size)[mesh.tp.rank]).abs().max()
    return of_y.item(), (rows.weight.grad - rows_of(weight.grad, rows)).abs().max().item()


@pytest.mark.parametrize(("tp", "v"), [(1, 13), (2, 13), (4, 9)])
def test_vectors_are_those_of_a_whole_embedding(tp: int, v: int) -> None:
    for errors in run_mesh(Sizes(tp=tp), errors_of_embedding, v):
        assert max(errors) < 1e-12


def largest_communicated(mesh: Mesh, v: int) -> int:
    sizes = [0]
    weight, x, _, targets = inputs(v)
    rows = VocabularyRows(v, H, rule=RULE, tp=mesh.tp)
    rows.weight.data = rows_of(weight, rows)
    held = x.chunk(mesh.tp.size)[mesh.tp.rank].clone().requires_grad_()
    real = {name: getattr(torch.distributed, name) for name in ("all_reduce",)}
    gathers = collectives._all_gather_flat, collectives.start_reduce_scatter

    def seen(collective: object) -> object:
        def call(*tensors: Tensor, **named: object) -> object:
            sizes.extend(tensor.numel() for tensor in tensors if isinstance(tensor, Tensor))
            return collective(*tensors, **named)  # type: ignore[operator]

        return call

    torch.distributed.all_reduce = seen(real["all_reduce"])
    collectives._all_gather_flat, collectives.start_reduce_scatter = (seen(one) for one in gathers)
    try:
        next_token_loss(held, rows, targets, STEP_TOKENS).backward()
    finally:
        torch.distributed.all_reduce = real["all_reduce"]
        collectives._all_gather_flat, collectives.start_reduce_scatter = gathers
    return max(sizes)


def test_no_logits_are_communicated() -> None:
    # The hidden vectors are: s * b * h numbers. Logits would be s * b * v, eight times as many.
    assert run_mesh(Sizes(tp=2), largest_communicated, 8 * H) == [S * B * H] * 2


def collectives_of(mesh: Mesh, with_gradients: bool) -> list[str]:
    """Return the operations of a loss in one chunk, forward only."""
    weight, x, _, targets = inputs(9)
    rows = VocabularyRows(9, H, rule=RULE, tp=mesh.tp)
    rows.weight.data = rows_of(weight, rows)
    held, calls = x.chunk(mesh.tp.size)[mesh.tp.rank].clone().requires_grad_(), list[str]()

    class Listener:
        def before(self, call: Call) -> None:
            calls.append(call.op)

        def after(self, call: Call, work: object) -> None:
            return None

        def waited(self, work: object) -> None:
            return None

    with watching(Listener()), torch.set_grad_enabled(with_gradients):
        next_token_loss(held, rows, targets, STEP_TOKENS)
    return calls


def test_an_evaluation_makes_no_gradients() -> None:
    """A weight says that it wants one whatever is asked for."""
    of_loss = ["all_gather", "all_reduce", "all_reduce"]
    assert run_mesh(Sizes(tp=2), collectives_of, False) == [of_loss] * 2
    assert run_mesh(Sizes(tp=2), collectives_of, True) == [[*of_loss, "reduce_scatter"]] * 2


def padded_rows(mesh: Mesh) -> Tensor:
    rows = VocabularyRows(9, H, rule=RULE, tp=mesh.tp)
    placement, shape = rows.placements()["weight"], tuple(rows.weight.shape)
    whole, offset = placement.global_shape(shape), placement.offset(shape)
    held = without_padding(rows.weight.detach().zero_(), whole, offset)
    fill(held, RULE, seed=1, name="w", global_shape=whole, offset=offset)
    return rows.weight.detach()


def test_padding_begins_as_zeros_and_the_rest_as_on_one_device() -> None:
    whole = run_mesh(Sizes(), padded_rows)[0]
    parts = torch.cat(run_mesh(Sizes(tp=4), padded_rows))
    assert torch.equal(parts[:9], whole)
    assert torch.equal(parts[9:], torch.zeros(3, H))
