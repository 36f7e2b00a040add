"""Room for what decoding keeps: doubled when it is full, within a bound, or made once and refused beyond that."""

import pytest
import torch
from engine_cases import dense_config, moe_config

from meshwright.model.config import ModelConfig
from meshwright.model.parts import build_model
from meshwright.model.room import LEAST, refuse_beyond, with_room


def test_rows_stay_and_room_is_doubled() -> None:
    rows = torch.arange(20.0).view(20, 1)
    assert with_room(rows, 20) is rows
    grown = with_room(rows, 21)
    assert grown.shape == (40, 1)
    assert torch.equal(grown[:20], rows)
    assert with_room(rows, 90).shape == (90, 1)
    assert with_room(rows[:0], 1).shape == (LEAST, 1)


def test_no_more_room_is_made_than_is_ever_used() -> None:
    rows = torch.arange(20.0).view(20, 1)
    assert with_room(rows, 21, most=33).shape == (33, 1)
    full = with_room(rows, 1000, most=33)
    assert full.shape == (33, 1)
    assert with_room(full, 1001, most=33) is full
    assert with_room(rows[:0], 1, most=3).shape == (3, 1)


def test_a_length_that_was_given_is_a_bound_and_none_is_none() -> None:
    refuse_beyond(7, 7)
    refuse_beyond(None, 10**9)
    with pytest.raises(ValueError, match="the cache has room for 7 tokens, 8 are needed"):
        refuse_beyond(7, 8)


@pytest.mark.parametrize("config", [dense_config(), moe_config(pattern="ME", mamba2={"num_heads": 2, "head_dim": 5})])
def test_a_model_is_full_at_the_length_that_was_given_and_never_without_one(config: ModelConfig) -> None:
    model, tokens = build_model(config).eval(), torch.zeros(3, 2, dtype=torch.int64)
    with torch.no_grad():
        bounded, free = model.initial_state(2, 8), model.initial_state(2)
        for _ in range(2):
            assert torch.equal(model.step(tokens, bounded), model.step(tokens, free))
        with pytest.raises(ValueError, match="has room for 8 tokens, 9 are needed"):
            model.step(tokens, bounded)
        for _ in range(10):
            model.step(tokens, free)
    assert free.length == 36


def test_a_step_beyond_the_learned_positions_is_told() -> None:
    model = build_model(dense_config(position="learned", max_positions=5)).eval()
    state = model.initial_state(1)
    with torch.no_grad():
        model.step(torch.zeros(5, 1, dtype=torch.int64), state)
        with pytest.raises(ValueError, match="the table of learned positions has room for 5 tokens, 6 are needed"):
            model.step(torch.zeros(1, 1, dtype=torch.int64), state)
