"""Mixture-of-Depths against a loop over the samples; decoding by the predictor; documents and counts."""

import math

import pytest
import torch
import torch.nn.functional as F
from engine_cases import dense_config, moe_config
from torch import Tensor

from meshwright.model.block import Layer
from meshwright.model.config import ModelConfig
from meshwright.model.depth import Depth, MixtureOfDepths
from meshwright.model.parts import build_model, initialise
from meshwright.parallel.context.order import zigzag_positions
from meshwright.parallel.mesh import NO_TP, Axis, single_process_mesh
from meshwright.parallel.sequence_order import rows_in_parts
from meshwright.parallel.tally import Tally, declared_entries
from meshwright.parallel.where import Where, place

S, B, H = 11, 3, 22
F64 = torch.float64


def config(gate: str = "score", pattern: str = "[*-]", **changes: object) -> ModelConfig:
    make = moe_config if "E" in pattern else dense_config
    depth = {"capacity": 0.4, "gate": gate, "predictor_size": 5}
    return make(**{"pattern": pattern, "num_layers": 1, "depth": depth, "init_std": 0.3, **changes})


def layer_of(made: ModelConfig) -> MixtureOfDepths:
    layer = build_model(made, seed=4, dtype=F64).layers["0"]
    assert isinstance(layer, MixtureOfDepths)
    return layer


def batch(mask_documents: bool = True) -> tuple[Tensor, Where]:
    """Return tokens and their place: a sample of three documents, one with padding, and one of padding alone."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(S, B, H, dtype=F64, generator=generator)
    document = torch.zeros(S, B, dtype=torch.int64)
    document[3:, 0] += 1
    document[7:, 0] += 1
    counted = torch.ones(S, B, dtype=torch.bool)
    counted[6:, 1] = False
    counted[:, 2] = False
    more = {"step": 3, "step_tokens": float(counted.sum()), "seed": 2, "mask_documents": mask_documents}
    return x, place(torch.arange(B) + 5, document, counted, torch.arange(S), NO_TP, **more)


def through(layer: MixtureOfDepths, x: Tensor, where: Where, tokens: list[int], b: int) -> Tensor:
    """Return what the layer itself makes of some tokens of one sample."""
    at = torch.tensor(tokens)
    document = where.document_whole[at, b : b + 1]
    inner = Where(
        step=where.step, sample=where.sample[b : b + 1], position=at, position_mixed=at,
        counted=where.counted[at, b : b + 1], document_whole=document, sequence_tokens=torch.tensor([len(tokens)]),
        step_tokens=where.step_tokens, seed=where.seed, mask_documents=where.mask_documents,
    )  # fmt: skip
    return Layer.forward(layer, x[at, b : b + 1], inner, None)[:, 0]


def chosen_by_hand(layer: MixtureOfDepths, x: Tensor, where: Where, b: int) -> list[int]:
    score = (x[:, b].detach() @ layer.router.weight.detach()[0]).tolist()
    tokens = [s for s in range(S) if where.counted[s, b]]
    number = math.ceil(0.4 * len(tokens))
    return sorted(sorted(tokens, key=lambda s: (-score[s], s))[:number])


# What is drawn for a token belongs to its position in the sample, not to its row among the chosen.
DROPPED = {"residual_dropout": 0.3, "attention_dropout": 0.2}
DRAWN = {"residual_dropout": 0.3, "expert_dropout": 0.2, "router_jitter": 0.5}


@pytest.mark.parametrize("gate", ["score", "sigmoid"])
@pytest.mark.parametrize(
    ("pattern", "draws"), [("[*-]", {}), ("[*E]", {}), ("[-]", {}), ("[*-]", DROPPED), ("[*E]", DRAWN)]
)
def test_the_chosen_tokens_go_through_as_a_sequence_of_their_own(
    pattern: str, draws: dict[str, float], gate: str
) -> None:
    layer, (x, where) = layer_of(config(gate, pattern, **draws)), batch()
    x.requires_grad_()
    y, rows = layer(x, where, None), []
    for b in range(B):
        tokens, column = chosen_by_hand(layer, x, where, b), list(x[:, b].unbind())
        assert len(tokens) == [5, 3, 0][b]
        if tokens:
            results = through(layer, x, where, tokens, b)
            for s, result in zip(tokens, results, strict=True):
                r = x[s, b] @ layer.router.weight[0]
                column[s] = x[s, b] + (r if gate == "score" else r.sigmoid()) * (result - x[s, b])
        rows.append(torch.stack(column))
    expected = torch.stack(rows, dim=1)
    torch.testing.assert_close(y, expected)
    of = [x, *(parameter for name, parameter in layer.named_parameters() if "predictor" not in name)]
    above = torch.randn_like(y)
    found, wanted = torch.autograd.grad(y, of, above), torch.autograd.grad(expected, of, above)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_predictor_learns_by_cross_entropy_and_leaves_the_stream_alone() -> None:
    layer, (x, where) = layer_of(config()), batch()
    tally = Tally(layer.tally_entries())
    x.requires_grad_()
    y = layer(x, where, tally)
    sums = tally.reduce(single_process_mesh())
    (0 * y).sum().backward()
    target = torch.zeros(S, B, dtype=torch.bool)
    for b in range(B):
        target[chosen_by_hand(layer, x, where, b), b] = True
    inward, outward = (p.detach().clone().requires_grad_() for p in (layer.predictor.inward, layer.predictor.weight))
    logits = (F.silu(x.detach() @ inward.T) @ outward.T)[..., 0]
    losses = F.binary_cross_entropy_with_logits(logits, target.double(), reduction="none")
    loss = losses[where.counted].sum() / where.step_tokens
    (0.01 * loss).backward()
    torch.testing.assert_close(layer.predictor.inward.grad, inward.grad)
    torch.testing.assert_close(layer.predictor.weight.grad, outward.grad)
    assert not x.grad.any()
    assert sums["layers.0.depth_predictor"].item() == pytest.approx(loss.item(), rel=1e-12)
    assert sums["layers.0.depth_chosen"] == target.sum() == 8
    assert sums["layers.0.depth_tokens"] == where.counted.sum()
    assert sums["layers.0.depth_right"] == ((logits > 0) == target)[where.counted].sum()


@pytest.mark.parametrize("pattern", ["[*-]", "[*E]"])
@pytest.mark.parametrize("stretches", [[1] * S, [4, 1, 6]])
def test_decoding_by_the_predictor_is_the_evaluation(pattern: str, stretches: list[int]) -> None:
    layer, (x, where) = layer_of(config(pattern=pattern)).eval(), batch(mask_documents=False)
    whole = layer(x, where, None)
    goes = layer.predictor(x) > 0
    assert len(set(goes.sum(0).tolist())) > 1, "samples differ in how many go through"
    assert torch.equal((whole != x).any(-1), goes)
    state = layer.initial_state(B, S)
    found = torch.cat([layer.step(piece, state) for piece in x.split(stretches)])
    torch.testing.assert_close(found, whole)


def test_in_evaluation_no_token_depends_on_a_later_one() -> None:
    layer, (x, where) = layer_of(config()).eval(), batch()
    y = layer(x, where, None)
    x[6:] = torch.randn(S - 6, B, H, dtype=F64, generator=torch.Generator().manual_seed(9))
    assert torch.equal(layer(x, where, None)[:6], y[:6])


def test_documents_do_not_see_each_other() -> None:
    layer, (x, where) = layer_of(config()).eval(), batch()
    with torch.no_grad():
        layer.predictor.weight.zero_()
        layer.predictor.weight[0, 0] = 100.0  # nearly half of all, whatever else
    y = layer(x, where, None)
    x[3:7, 0] += 1.0
    changed = (layer(x, where, None) != y).any(-1)
    assert not changed[:3, 0].any()
    assert not changed[7:, 0].any()
    _, mixed = batch(mask_documents=False)
    assert changed[3:7, 0].any()
    assert (layer(x, mixed, None) != y)[7:, 0].any()


def test_rows_behind_the_last_chosen_change_nothing() -> None:
    layer, (x, where) = layer_of(config(pattern="[*E]", router="expert_choice")), batch()
    tallies, results = [], []
    for more in (0, 4):
        layer._rows = lambda chosen, more=more: 5 + more
        tally = Tally(declared_entries(layer))
        results.append(layer(x, where, tally))
        tallies.append(tally.reduce(single_process_mesh()))
    torch.testing.assert_close(*results)
    for name, value in tallies[0].items():
        torch.testing.assert_close(tallies[1][name], value, msg=name)


def test_rows_lie_evenly_on_the_ranks_as_a_sequence_does() -> None:
    assert rows_in_parts(5, Axis("cp"), Axis("tp")) == 5
    assert rows_in_parts(0, Axis("cp"), Axis("tp")) == 1
    assert rows_in_parts(5, Axis("cp"), Axis("tp", 4)) == 8
    assert rows_in_parts(5, Axis("cp", 2), Axis("tp")) == 8
    assert rows_in_parts(5, Axis("cp", 3), Axis("tp", 4)) == 12
    for s in (4, 12, 24):
        assert rows_in_parts(s, Axis("cp", 2), Axis("tp", 2)) == s == 2 * len(zigzag_positions(s, Axis("cp", 2)))


def test_a_share_that_is_none_is_refused() -> None:
    for capacity in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"capacity = {capacity} must be above 0 and at most 1; 0.125 is usual"):
            MixtureOfDepths(None, None, H, Depth(capacity))
    initialise(MixtureOfDepths(None, None, H))
