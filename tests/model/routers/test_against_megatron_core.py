"""Losses, balances and choices of routers are those of megatron-core's own functions, where that is installed.

Nothing of ours needs it. On a CPU `pip install --no-deps "megatron-core>=0.16,<0.17"` is enough; later ones import
triton. What is different there, and is made equal here by hand: it knows no padding, so every token counts; a
micro-batch is one group for Sinkhorn, so there is one sequence; a loss comes weighted, so the weight is 1.
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


def all_count() -> Tensor:
    return torch.ones(S, B, dtype=torch.bool)


def assert_same_loss(ours: Tensor, theirs: Tensor, of: Tensor) -> None:
    """Compare a loss and its gradient; theirs may be made in fp32."""
    assert ours.item() > 0
    torch.testing.assert_close(ours, theirs.to(F64), rtol=1e-6, atol=1e-7)
    wanted = torch.autograd.grad(theirs, of)[0]
    assert wanted.abs().max() > 0
    torch.testing.assert_close(torch.autograd.grad(ours, of)[0], wanted, rtol=1e-5, atol=1e-8)


def test_the_z_loss() -> None:
    scores = scores_of()
    ours = z_loss(scores, all_count(), step_tokens=float(S * B))
    assert_same_loss(ours, call("z_loss_func", scores.flatten(0, 1), 1.0), scores)


@pytest.mark.parametrize("top_k", [1, K])
def test_the_load_balancing_loss_of_each_sequence(top_k: int) -> None:
    """Theirs of a batch is the mean over its sequences, each by itself (`seq_aux_loss`)."""
    scores = scores_of()
    probability = scores.softmax(-1)
    expert = probability.detach().topk(top_k).indices
    choices = choices_per_sequence(expert, all_count(), E)
    assert choices.sum() == S * B * top_k
    lengths = torch.full((B,), S)
    ours = sequence_balance_loss(
        probability, choices, all_count(), sequence_tokens=lengths, top_k=top_k, step_tokens=float(S * B)
    )
    of_sequences = [their_balance(probability[:, b], choices[b], top_k, S) for b in range(B)]
    assert_same_loss(ours, torch.stack(of_sequences).mean(), scores)


def test_the_load_balancing_loss_of_a_whole_step() -> None:
    """Theirs counts the load of the step itself (`global_aux_loss`), ours that which is handed in."""
    scores = scores_of()
    probability = scores.softmax(-1)
    choices = torch.bincount(probability.detach().topk(K).indices.flatten(), minlength=E)
    ours = step_balance_loss(probability, choices / (S * B * K), all_count(), step_tokens=float(S * B))
    assert_same_loss(ours, their_balance(probability.flatten(0, 1), choices, K, S * B), scores)


def their_balance(probability: Tensor, choices: Tensor, top_k: int, tokens: int) -> Tensor:
    """Return megatron-core's loss of some tokens, with weight 1."""
    loss: Tensor = call(
        "switch_load_balancing_loss_func",
        probability,
        choices,
        total_num_tokens=tokens,
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


CHOICES = {
    "softmax, normalised": ("softmax", Ways(), {"score_function": "softmax", "use_pre_softmax": False}),
    "softmax": ("softmax", Ways(normalise=False), {"score_function": "softmax", "use_pre_softmax": True}),
    "softmax of the best groups": (
        "softmax",
        Ways(normalise=False, num_groups=4, top_groups=2, scale=1.5),
        {"score_function": "softmax", "use_pre_softmax": True, "num_groups": 4, "group_topk": 2, "scaling_factor": 1.5},
    ),
    "sigmoid": ("sigmoid", Ways(scale=2.5), {"score_function": "sigmoid", "scaling_factor": 2.5, "expert_bias": True}),
    "sigmoid of the best group": (
        "sigmoid",
        Ways(num_groups=2),
        {"score_function": "sigmoid", "num_groups": 2, "group_topk": 1, "expert_bias": True},
    ),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choices_and_weights(name: str) -> None:
    kind, ways, theirs = CHOICES[name]
    router = make_router(kind, H, E, K, ways).to(F64)
    initialise(router, seed=1)
    torch.nn.init.normal_(router.weight)
    if theirs.get("expert_bias"):
        torch.nn.init.normal_(router.bias)
        theirs = theirs | {"expert_bias": router.bias}
    x = torch.randn(S, B, H, dtype=F64)
    found = router.eval()(x, where_of_plain_tokens(torch.zeros(S, B, dtype=torch.int64)))
    logits = found.scores.flatten(0, 1)
    weights, chosen = call("topk_routing_with_score_function", logits, K, **theirs)[:2]
    ours = torch.zeros(S * B, E, dtype=F64).scatter(1, found.expert.flatten(0, 1), found.weight.flatten(0, 1))
    assert torch.equal(ours != 0, chosen.bool())
    torch.testing.assert_close(ours, weights.to(F64), rtol=1e-6, atol=1e-7)
