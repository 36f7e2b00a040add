"""Losses, balances and choices of routers are those of megatron-core's own functions, where that is installed.

Nothing of ours needs it. On a CPU `pip install --no-deps "megatron-core>=0.16,<0.17"` is enough; later ones import
triton. What is different there, and is made equal here by hand: padding is left out of what it is given; the loss of a
batch is the mean over its sequences, however long each is; Sinkhorn balances a micro-batch and not a sequence, so there
is one of them; and in groups a group's score is the sum of its best top_k / top_groups experts, so these are the number
that ours takes.
"""

import inspect
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from meshwright.model.parts import initialise
from meshwright.model.routers.balance import (
    choices_per_sequence,
    sequence_balance_loss,
    step_balance_loss,
    z_loss,
)
from meshwright.model.routers.router import Ways
from meshwright.model.routers.sinkhorn import sinkhorn_columns
from meshwright.model.routers.table import make_router
from meshwright.parallel.where import where_of_plain_tokens

S, B, E, K, H = 30, 3, 8, 2, 12
F64 = torch.float64


def imported() -> tuple[ModuleType | None, str]:
    """Return megatron-core's module of functions, or why there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from megatron.core.transformer.moe import moe_utils
    except ModuleNotFoundError as error:
        return None, f"megatron-core is not installed here, or not all that it imports: {error}"
    except Exception as error:  # a half-installed Transformer Engine raises what it likes
        return None, f"megatron-core does not import here: {type(error).__name__}: {error}"
    return moe_utils, ""


UTILS, REASON = imported()
pytestmark = pytest.mark.skipif(UTILS is None, reason=REASON)


def call(name: str, *given: Any, **named: Any) -> Any:
    """Call one of its functions, with those of the named arguments that its version has."""
    function = getattr(UTILS, name)
    known = inspect.signature(function).parameters
    return function(*given, **{key: value for key, value in named.items() if key in known})


def scores_of(seed: int = 0, k: int = E) -> Tensor:
    return torch.randn(S, B, k, dtype=F64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def counted_of(has_padding: bool) -> Tensor:
    """Return which tokens count: all, or of each sequence another number."""
    lengths = torch.tensor([S, S // 2, 1]) if has_padding else torch.full((B,), S)
    return torch.arange(S)[:, None] < lengths


def assert_same_loss(ours: Tensor, theirs: Tensor, of: Tensor) -> None:
    """Compare a loss and its gradient; theirs may be made in fp32."""
    assert ours.item() > 0
    torch.testing.assert_close(ours, theirs.to(F64), rtol=1e-6, atol=1e-7)
    wanted = torch.autograd.grad(theirs, of, retain_graph=True)[0]
    assert wanted.abs().max() > 0
    torch.testing.assert_close(torch.autograd.grad(ours, of)[0], wanted, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("has_padding", [False, True])
def test_the_z_loss(has_padding: bool) -> None:
    scores, counted = scores_of(), counted_of(has_padding)
    ours = z_loss(scores, counted, step_tokens=float(counted.sum()))
    assert_same_loss(ours, call("z_loss_func", scores[counted], 1.0), scores)


@pytest.mark.parametrize("has_padding", [False, True])
@pytest.mark.parametrize("top_k", [1, K])
def test_the_load_balancing_loss_of_each_sequence(top_k: int, has_padding: bool) -> None:
    """Theirs of a batch is the mean over its sequences, one by one (`seq_aux_loss`); ours weighs by their tokens."""
    scores, counted = scores_of(), counted_of(has_padding)
    probability, lengths = scores.softmax(-1), counted.sum(0)
    choices = choices_per_sequence(probability.detach().topk(top_k).indices, counted, E)
    assert choices.sum(1).tolist() == (top_k * lengths).tolist()
    ours = sequence_balance_loss(
        probability, choices, counted, sequence_tokens=lengths, top_k=top_k, step_tokens=float(lengths.sum())
    )
    of_sequences = [their_balance(probability[counted[:, b], b], choices[b], top_k) for b in range(B)]
    share = lengths / lengths.sum()
    assert has_padding or torch.equal(share, torch.full((B,), 1 / B))
    assert_same_loss(ours, (torch.stack(of_sequences) * share).sum(), scores)


@pytest.mark.parametrize("has_padding", [False, True])
def test_the_load_balancing_loss_of_a_whole_step(has_padding: bool) -> None:
    """Theirs counts the load of the step itself (`global_aux_loss`), ours that which is handed in."""
    scores, counted = scores_of(), counted_of(has_padding)
    probability, tokens = scores.softmax(-1), counted.sum()
    choices = torch.bincount(probability.detach()[counted].topk(K).indices.flatten(), minlength=E)
    ours = step_balance_loss(probability, choices / (tokens * K), counted, step_tokens=float(tokens))
    assert_same_loss(ours, their_balance(probability[counted], choices, K), scores)


def their_balance(probability: Tensor, choices: Tensor, top_k: int) -> Tensor:
    """Return megatron-core's loss of some tokens, with weight 1."""
    loss: Tensor = call(
        "switch_load_balancing_loss_func",
        probability,
        choices,
        total_num_tokens=len(probability),
        topk=top_k,
        num_experts=E,
        moe_aux_loss_coeff=1.0,
    )
    return loss


def test_sinkhorns_balance() -> None:
    scores = torch.randn(30, E, generator=torch.Generator().manual_seed(3))
    columns = sinkhorn_columns(scores[:, None], torch.ones(30, 1, dtype=torch.bool))
    theirs = call("sinkhorn", scores)
    ratio = theirs / (scores.exp() * columns[0])
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio).contiguous())


# Kind, top_k, ways, and what theirs is given for these.
CHOICES = {
    "softmax, normalised": ("softmax", K, Ways(), {"score_function": "softmax", "use_pre_softmax": False}),
    "softmax": ("softmax", K, Ways(normalise=False), {"score_function": "softmax", "use_pre_softmax": True}),
    "softmax of the best groups": (
        "softmax",
        3,
        Ways(normalise=False, num_groups=4, top_groups=2, scale=1.5),
        {"score_function": "softmax", "use_pre_softmax": True, "num_groups": 4, "group_topk": 2, "scaling_factor": 1.5},
    ),
    "sigmoid": (
        "sigmoid",
        K,
        Ways(scale=2.5),
        {"score_function": "sigmoid", "scaling_factor": 2.5, "expert_bias": True},
    ),
    "sigmoid of the best group": (
        "sigmoid",
        K,
        Ways(num_groups=2),
        {"score_function": "sigmoid", "num_groups": 2, "group_topk": 1, "expert_bias": True},
    ),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choices_and_weights(name: str) -> None:
    kind, top_k, ways, theirs = CHOICES[name]
    router = make_router(kind, H, E, top_k, ways).to(F64)
    initialise(router, seed=1)
    torch.nn.init.normal_(router.weight)
    if theirs.get("expert_bias"):
        torch.nn.init.normal_(router.bias)
        theirs = theirs | {"expert_bias": router.bias}
    x = torch.randn(S, B, H, dtype=F64)
    found = router.eval()(x, where_of_plain_tokens(torch.zeros(S, B, dtype=torch.int64)))
    logits = found.scores.flatten(0, 1)
    weights, chosen = call("topk_routing_with_score_function", logits, top_k, **theirs)[:2]
    ours = torch.zeros(S * B, E, dtype=F64).scatter(1, found.expert.flatten(0, 1), found.weight.flatten(0, 1))
    assert torch.equal(ours != 0, chosen.bool())
    if ways.num_groups > 1:
        free = router.choose(found.probability.flatten(0, 1) + (router.bias if kind == "sigmoid" else 0.0))
        assert not torch.equal(free, found.expert.flatten(0, 1)), "groups change no choice, and are not tested"
    torch.testing.assert_close(ours, weights.to(F64), rtol=1e-6, atol=1e-7)
