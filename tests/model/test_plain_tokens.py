"""Tokens without a place: the mean over the targets that count, for routers too; what does not fit is told at once."""

import re

import pytest
import torch
import torch.nn.functional as F
from engine_cases import dense_config, moe_config
from torch._subclasses.fake_tensor import FakeTensorMode

from meshwright.model.parts import build_model
from meshwright.model.plain_tokens import place_of_plain_tokens
from meshwright.parallel.tally import Tally, declared_entries, finish_step

S, B, V = 7, 3, 31
TOKENS = torch.randint(0, V, (S, B), generator=torch.Generator().manual_seed(0))
TARGETS = torch.randint(0, V, (S, B), generator=torch.Generator().manual_seed(1))


def test_the_loss_is_the_mean_over_the_targets_that_count() -> None:
    targets = TARGETS.clone()
    targets[3:, 0] = -100
    targets[:, 1] = -100
    model = build_model(dense_config(vocab_size=V), seed=0, dtype=torch.float64)
    logits = model(TOKENS).flatten(0, 1)
    torch.testing.assert_close(model(TOKENS, targets), F.cross_entropy(logits, targets.flatten()))
    assert model(TOKENS, torch.full_like(targets, -100)) == 0


def test_tokens_without_a_target_do_not_count_for_routers() -> None:
    targets = TARGETS.clone()
    targets[5:] = -100
    model = build_model(moe_config(vocab_size=V), seed=0)
    tally = Tally(declared_entries(model))
    model(TOKENS, targets, tally=tally)
    assert finish_step(model, tally)["layers.0.load"].sum() == 2 * 5 * B  # top_k = 2
    where = place_of_plain_tokens(TOKENS, targets, V)
    assert (where.step_tokens, where.sequence_tokens.tolist()) == (5.0 * B, [5] * B)


@pytest.mark.parametrize(
    ("tokens", "targets", "told"),
    [
        (TOKENS[:0], None, "tokens of shape [0, 3]: must be at least 1 of at least 1 sample"),
        (TOKENS[:, 0], None, "tokens of shape [7]: must be [s, b], the tokens of a sample along the first dim"),
        (TOKENS, TARGETS[1:], "targets of shape [6, 3]: must be of the tokens' shape, [7, 3]"),
        (TOKENS.float(), None, "tokens of torch.float32: must be torch.int64 or torch.int32"),
        (TOKENS, TARGETS.int(), "targets of torch.int32: must be torch.int64"),
        (TOKENS, TARGETS - V, "targets with -"),
        (TOKENS, TARGETS.where(TARGETS > 9, -1), "targets with -1: must be from 0 to vocab_size - 1 = 30, or -100"),
        (TOKENS + V, TARGETS, "tokens with "),
    ],
)
def test_what_does_not_fit_is_told(tokens: torch.Tensor, targets: torch.Tensor | None, told: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(told)}"):
        place_of_plain_tokens(tokens, targets, V)


def test_a_model_tells_it() -> None:
    model = build_model(dense_config(vocab_size=V), seed=0)
    with pytest.raises(ValueError, match="targets with -1: must be from 0"):
        model(TOKENS, TARGETS.where(TARGETS > 9, -1))


def test_all_that_does_not_fit_is_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"(?s)positions.*shape.*tokens with 31.*targets with 40"):
        place_of_plain_tokens(torch.full((S, B), V), torch.full((S, B + 1), 40), V, S - 1)
    place_of_plain_tokens(TOKENS, TARGETS, V, S)


def test_more_tokens_than_learned_positions_are_told() -> None:
    model = build_model(dense_config(vocab_size=V, position="learned", max_positions=S - 1), seed=0)
    with pytest.raises(ValueError, match="7 of a sample are more than the 6 learned positions"):
        model(TOKENS)


def test_shapes_can_be_asked_for_without_numbers() -> None:
    model = build_model(dense_config(vocab_size=V), seed=0)
    targets = TARGETS.clone()
    targets[4:] = -100
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(TOKENS), mode.from_tensor(targets)).shape == ()
    assert place_of_plain_tokens(TOKENS.int(), targets, V).step_tokens == (targets != -100).sum()


@pytest.mark.parametrize("keys", [{"residual_dropout": 0.5}, {"embedding_dropout": 0.5}, {"attention_dropout": 0.5}])
def test_each_training_call_draws_anew_by_the_usual_seed(keys: dict[str, float]) -> None:
    model = build_model(dense_config(vocab_size=V, **keys), seed=0)

    def losses() -> list[float]:
        torch.manual_seed(3)
        return [model(TOKENS, TARGETS).item() for _ in range(3)]

    first = losses()
    assert len(set(first)) == 3
    assert losses() == first
    model.eval()
    assert len(set(losses())) == 1
