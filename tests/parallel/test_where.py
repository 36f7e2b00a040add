"""What layers share of a place: made once for all of them, and never taken over to another place."""

from dataclasses import replace
from itertools import count

import pytest
import torch
from engine_cases import VOCAB, dense_config
from part_samples import SAMPLES

from meshwright.model.parts import build_model
from meshwright.parallel.where import Where, where_of_plain_tokens


def place() -> Where:
    return where_of_plain_tokens(torch.zeros(6, 2, dtype=torch.int64))


def test_what_is_derived_is_shared_with_laps_and_recomputed_calls() -> None:
    where, numbers = place(), count()
    lap, again = where.of_lap(1), where.remembering()
    assert {at.derive("key", lambda: next(numbers)) for at in (lap, where, again, again.of_lap(2))} == {0}


def test_a_place_made_of_another_derives_anew() -> None:
    where, numbers = place(), count()
    where.derive("key", lambda: next(numbers))
    other = replace(where, document_whole=where.document_whole + 1)
    assert other.derive("key", lambda: next(numbers)) == 1
    assert where.derive("key", lambda: next(numbers)) == 0


def test_documents_given_to_a_place_that_was_used_are_those_that_layers_see() -> None:
    for pattern, more in (("*-", {}), ("M-", {"mamba2": {"head_dim": 11, "state_size": 8}})):
        model = build_model(dense_config(pattern=pattern, **more), seed=1).eval()
        tokens = torch.randint(0, VOCAB, (6, 2), generator=torch.Generator().manual_seed(0))
        document = torch.tensor([[0] * 3 + [1] * 3, [0] * 6]).T
        used, fresh = replace(place(), mask_documents=True), replace(place(), mask_documents=True)
        with torch.no_grad():
            model(tokens, None, used)
            found, expected = (model(tokens, None, replace(at, document_whole=document)) for at in (used, fresh))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["dense", "latent_attention"])
def test_angles_of_one_dtype_are_not_those_of_another(name: str) -> None:
    config = SAMPLES[name] if name in SAMPLES else dense_config(hidden_size=22)
    where, x = place(), torch.randn(6, 2, config.hidden_size, dtype=torch.float64)
    layers = {
        dtype: build_model(config, dtype=dtype, seed=1).layers["0"].eval() for dtype in (torch.bfloat16, torch.float64)
    }
    layers[torch.bfloat16](x.bfloat16(), where, None)
    found, expected = (layers[torch.float64](x, at, None) for at in (where, place()))
    assert torch.equal(found, expected)
