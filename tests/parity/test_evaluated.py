"""Samples cut over ranks: evaluation gives each batch's loss of one process, and a document is seen by no other.

Both over the models of part_samples.py, in fp64, documents apart. In training the same is held by
test_parts_in_layouts.py; evaluation routes otherwise (predictors, thresholds, no capacity) and draws nothing.
"""

from functools import cache

import pytest
import torch
from engine_cases import BATCH, SEQ, VOCAB, Samples, micro_batch_of, start
from part_samples import OF_KINDS, SAMPLES
from rank_pool import run_mesh
from torch import Tensor

from meshwright.parallel.apply import Plan
from meshwright.parallel.collectives import all_reduce
from meshwright.parallel.config import ContextWay
from meshwright.parallel.context.order import zigzag_positions
from meshwright.parallel.mesh import Mesh, Sizes, single_process_mesh
from meshwright.parallel.where import place

WITHOUT_CP = {"block_sparse_attention", "s4d"}
APART = Samples(mask_documents=True)
CUTS = {"tp": Sizes(tp=2), "cp": Sizes(cp=2), "cp, tp": Sizes(cp=2, tp=2)}
QUICK = [("depth by sigmoid", "cp"), ("router expert_choice", "tp"), ("mamba2", "cp, tp")]


def goes_over_cp(name: str) -> bool:
    return not {kind.name for kind in SAMPLES[name].part_kinds} & WITHOUT_CP


def evaluated(mesh: Mesh, name: str) -> list[float]:
    """Return the loss of each two samples; all ranks that share them have a part of it."""
    run = start(mesh, SAMPLES[name], Plan(), samples=APART)
    run.model.eval()
    losses = []
    with torch.no_grad():
        for begin in range(0, BATCH, 2):
            some = micro_batch_of(run, 0, begin, 2)
            loss = run.model(some.tokens, some.targets, some.where, run.tally).double().reshape(1).clone()
            all_reduce(loss, mesh.token)
            losses.append(loss.item())
    return losses


def evaluations() -> list[object]:
    """Return what is run by default, and all else."""
    every = [(name, cut) for name in SAMPLES for cut in CUTS if cut == "tp" or goes_over_cp(name)]
    return [*QUICK, *(pytest.param(*one, marks=pytest.mark.slow) for one in every if one not in QUICK)]


@pytest.mark.parametrize(("name", "cut"), evaluations())
def test_evaluation_on_ranks_gives_the_losses_of_one_process(name: str, cut: str) -> None:
    expected = evaluated(single_process_mesh(), name)
    assert any(loss > 0 for loss in expected)
    for losses in run_mesh(CUTS[cut], evaluated, name):
        assert losses == pytest.approx(expected, rel=1e-9)  # fp64 sums in another order (promise 2)


# Positions of the documents lie on every rank, over the edges of their stretches, and end within them.
DOCUMENTS = torch.tensor([[0] * 3 + [1] + [2] * 5 + [3] * 3, [0] + [1] * 6 + [2] * 5]).T
CHANGED = ((0, 0), (0, 2), (1, 1))
"""Sample and document."""


@cache
def text() -> Tensor:
    return torch.randint(0, VOCAB, DOCUMENTS.shape, generator=torch.Generator().manual_seed(1))


def moved(mesh: Mesh, name: str, context: ContextWay) -> list[tuple[bool, bool]]:
    """Say for each changed document whether logits of others moved on this rank, and whether all of its own did."""
    run = start(mesh, SAMPLES[name], Plan(), samples=Samples(context, mask_documents=True))
    # A routed layer chooses among all tokens of a sequence while it trains, and each by itself in evaluation.
    run.model.train(not name.startswith("depth"))
    mine, counted = zigzag_positions(SEQ, mesh.cp), torch.ones_like(DOCUMENTS, dtype=torch.bool)
    more = {"step": 0, "step_tokens": 24.0, "mask_documents": True, "seed": 2}

    @torch.no_grad()
    def logits(tokens: Tensor) -> Tensor:
        where = place(torch.arange(2) + 5, DOCUMENTS, counted, mine, mesh.tp, **more)
        return run.model(tokens[mine], None, where)

    before, found = logits(text()), []
    for sample, document in CHANGED:
        own = torch.zeros_like(counted)
        own[:, sample] = DOCUMENTS[:, sample] == document
        after = logits(torch.where(own, (text() + 5) % VOCAB, text()))
        # 1e-12 of the largest: what is summed with exact zeros may round otherwise, what leaks is far above.
        has_moved = (after - before).abs().amax(-1) > 1e-12 * before.abs().max()
        found.append((bool(has_moved[~own[mine]].any()), bool(has_moved[own[mine]].all())))
    return found


def spread_samples() -> list[object]:
    """Return what is run by default, and all else: mixers over cp by rings, attention by heads too."""
    names = [*OF_KINDS, "mamba2, one group", "hybrid", "alibi", "t5"]
    names += [f"depth around {pattern}" for pattern in ("*-", "M-", "G-", "m-", "H-")]
    heads = ("attention", "sliding_attention", "latent_attention", "switch_head", "t5", "alibi")
    every = [(name, "ring", cp) for name in names if goes_over_cp(name) for cp in (2, 3)]
    every += [(name, "ulysses", 2) for name in heads]
    quick = [("hybrid", "ring", 2), ("latent_attention", "ulysses", 2)]
    return [*quick, *(pytest.param(*one, marks=pytest.mark.slow) for one in every if one not in quick)]


@pytest.mark.parametrize(("name", "context", "cp"), spread_samples())
def test_a_change_of_one_document_moves_no_other_over_cp(name: str, context: ContextWay, cp: int) -> None:
    for found in run_mesh(Sizes(cp=cp), moved, name, context):
        assert found == [(False, True)] * len(CHANGED)
