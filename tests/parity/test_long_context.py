"""A sample of 65,536 tokens on four ranks: loss and gradients are those of one process.

Where documents are masked, one process has them as samples of their own: attention knows positions by their
differences only, so a sample of eight documents is eight samples of one.
"""

import time

import pytest
import torch
from rank_pool import run_mesh
from torch import Tensor

from meshwright.model.config import ModelConfig
from meshwright.model.parts import build_model
from meshwright.parallel.collectives import all_reduce
from meshwright.parallel.context.order import zigzag_positions
from meshwright.parallel.mesh import NO_TP, Mesh, Sizes, single_process_mesh
from meshwright.parallel.where import place

LENGTH, DOCUMENTS = 1 << 16, 8
CONFIG = ModelConfig(
    pattern="*-",
    num_layers=1,
    hidden_size=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    ffn_hidden_size=16,
    vocab_size=64,
)


def sample(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, targets and documents of one long sample, or of as many as `rows` says, side by side."""
    generator = torch.Generator().manual_seed(1)
    tokens, targets = (torch.randint(0, 64, (LENGTH,), generator=generator) for _ in range(2))
    document = torch.arange(LENGTH) // (LENGTH // DOCUMENTS)
    return tuple(x.view(rows, -1).T.contiguous() for x in (tokens, targets, document))


def loss_and_gradients(mesh: Mesh, rows: int, masked: bool) -> tuple[float, dict[str, Tensor], float]:
    """Return the loss, the gradients and the seconds; the same on all ranks but for the seconds."""
    began = time.monotonic()
    tokens, targets, document = sample(rows)
    model = build_model(CONFIG, mesh=mesh, seed=2)
    mine = zigzag_positions(len(tokens), mesh.cp)
    counted = torch.ones_like(tokens, dtype=torch.bool)
    ids = torch.arange(rows)
    where = place(ids, document, counted, mine, NO_TP, step=0, step_tokens=float(LENGTH), mask_documents=masked)
    loss = model(tokens[mine], targets[mine], where)
    loss.backward()
    total = loss.detach().double()
    all_reduce(total, mesh.cp)
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    for gradient in gradients.values():
        all_reduce(gradient, mesh.cp)
    return total.item(), gradients, time.monotonic() - began


def check(found: list[tuple[float, dict[str, Tensor], float]], alone: tuple[float, dict[str, Tensor], float]) -> None:
    """Compare every rank's loss and gradients with those of one process."""
    for loss, gradients, seconds in found:
        print(f"{seconds:.1f} s on a rank, {alone[2]:.1f} s alone")
        assert loss == pytest.approx(alone[0], rel=1e-6)
        assert gradients.keys() == alone[1].keys()
        for name, gradient in gradients.items():
            # fp32: a weight's gradient is a sum of 65,536 terms of both signs; positions are turned by other angles.
            error = (gradient - alone[1][name]).norm() / alone[1][name].norm()
            assert error < 1e-4, f"{name}: {error}"


@pytest.mark.slow
def test_a_sample_of_64k_tokens_on_four_ranks_trains_as_on_one_process() -> None:
    check(run_mesh(Sizes(cp=4), loss_and_gradients, 1, False), loss_and_gradients(single_process_mesh(), 1, False))


@pytest.mark.slow
def test_masked_documents_of_64k_tokens_train_like_samples_of_their_own() -> None:
    alone = loss_and_gradients(single_process_mesh(), DOCUMENTS, False)
    check(run_mesh(Sizes(cp=4), loss_and_gradients, 1, True), alone)
