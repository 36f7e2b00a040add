"""Dropout and jitter give each element of the run its own factor, wherever and however often it is computed."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from meshwright.kernels.limits import USUAL, Limits
from meshwright.parallel.counter_rng import stream_key
from meshwright.parallel.dropout import RowsOf, dropout, dropout_of_rows, jitter
from meshwright.parallel.where import Where, where_of_plain_tokens

S, B, H = 12, 5, 22  # H is no multiple of the four words of a counter


def somewhere(step: int = 3, seed: int = 7) -> Where:
    where = where_of_plain_tokens(torch.zeros(S, B, dtype=torch.int64))
    return replace(where, step=step, seed=seed, sample=torch.tensor([40, 41, 2**31, 7, 2**40 + 1]))


def part_of(where: Where, tokens: Any, samples: slice) -> Where:
    """Return the place as a rank has it that holds these tokens of these samples between layers."""
    return replace(
        where,
        sample=where.sample[samples],
        position=where.position[tokens],
        counted=where.counted[tokens][:, samples],
        document_whole=where.document_whole[:, samples],
        sequence_tokens=where.sequence_tokens[samples],
    )


def drop(x: Tensor, where: Where, **cut: Any) -> Tensor:
    return dropout(x, 0.3, where=where, name="layers.0.mixer", **cut)


def shake(x: Tensor, where: Where, **cut: Any) -> Tensor:
    return jitter(x, 0.2, where=where, name="layers.0.router", **cut)


@pytest.mark.parametrize("draw", [drop, shake])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_any_cut_of_sequence_batch_and_features_gives_the_bits_of_the_whole(draw: Any, dtype: torch.dtype) -> None:
    where, x = somewhere(), torch.randn(S, B, H).to(dtype)
    whole = draw(x, where)
    order = torch.tensor([0, 3, 8, 11, 1, 2])  # a rank's tokens in the order of balanced context parallelism
    cuts = [(slice(0, 5), slice(0, 2), slice(0, 22)), (slice(5, 12), slice(2, 5), slice(3, 14))]
    cuts += [(order, slice(1, 4), slice(21, 22)), (slice(11, 12), slice(4, 5), slice(4, 8))]
    for tokens, samples, features in cuts:
        held = part_of(where, tokens, samples)
        part = draw(x[tokens][:, samples, features], held, first_feature=features.start)
        assert torch.equal(part, whole[tokens][:, samples, features])
        elsewhere = part_of(where, slice(0, 1), samples)  # within a mixer, where other tokens are seen than held
        cut = {"first_feature": features.start, "position": held.position}
        mixed = draw(x[tokens][:, samples, features], elsewhere, **cut)
        assert torch.equal(mixed, part)


@pytest.mark.parametrize("draw", [drop, shake])
def test_pieces_make_no_difference(draw: Any) -> None:
    x = torch.randn(S, B, H)
    whole = draw(x, somewhere())
    for size in (1, 3 * B * H, 10**6):
        assert torch.equal(draw(x, replace(somewhere(), limits=Limits(factors_on_cpu=size))), whole)


@pytest.mark.parametrize("draw", [drop, shake])
def test_every_part_of_a_place_changes_the_draw(draw: Any) -> None:
    x, where = torch.ones(S, B, H), somewhere()
    first = draw(x, where)
    others = [
        draw(x, replace(where, step=4)),
        draw(x, replace(where, seed=8)),
        draw(x, replace(where, sample=where.sample + 1)),
        draw(x, replace(where, position=where.position + 1)),
        draw(x, where, first_feature=4),
        dropout(x, 0.3, where=where, name="layers.1.mixer"),
    ]
    for other in others:
        # Masks that know nothing of each other differ in 2 * 0.7 * 0.3 of the elements; jitter differs everywhere.
        assert (other != first).double().mean() > 0.3
    shifted = draw(x, replace(where, position=where.position + 1))
    assert torch.equal(shifted[:-1], first[1:])


@pytest.mark.parametrize("draw", [drop, shake])
def test_the_backward_pass_multiplies_by_the_same_factors_and_keeps_none(draw: Any) -> None:
    where, x = somewhere(), torch.randn(S, B, H, dtype=torch.float64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = draw(x, where)
    assert not kept
    above = torch.randn(S, B, H, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(y, x, above)
    factors = draw(torch.ones(S, B, H, dtype=torch.float64), where)
    assert torch.equal(gradient, above * factors)
    assert torch.equal(y, x * factors)


def test_a_recomputed_pass_draws_the_same() -> None:
    where, x = somewhere(), torch.randn(S, B, H, requires_grad=True)
    plain = torch.autograd.grad(drop(x, where).square().sum(), x)[0]
    torch.manual_seed(11)  # no generator has a say
    again = checkpoint(lambda x: drop(x, where), x, use_reentrant=False, preserve_rng_state=False)
    assert torch.equal(torch.autograd.grad(again.square().sum(), x)[0], plain)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_that_is_dropped_is_p_and_the_mean_stays(p: float) -> None:
    s, b, h = 128, 4, 256
    where = where_of_plain_tokens(torch.zeros(s, b, dtype=torch.int64))
    y = dropout(torch.ones(s, b, h, dtype=torch.float64), p, where=where, name="x")
    assert set(y.unique().tolist()) == {0.0, 1.0 / (1.0 - p)}
    n = y.numel()
    four_errors = 4 * math.sqrt(p * (1 - p) / n)
    dropped = (y == 0).double()
    assert abs(dropped.mean() - p) < four_errors
    for neighbours in (
        dropped[1:] * dropped[:-1],
        dropped[:, 1:] * dropped[:, :-1],
        dropped[..., 1:] * dropped[..., :-1],
    ):
        assert abs(neighbours.mean() - p * p) < 5 * math.sqrt(p * p * (1 - p * p) / neighbours.numel())


def test_jitter_is_spread_evenly_over_its_range() -> None:
    s, b, h, eps = 64, 4, 256, 0.25
    where = where_of_plain_tokens(torch.zeros(s, b, dtype=torch.int64))
    u = jitter(torch.ones(s, b, h, dtype=torch.float64), eps, where=where, name="x").flatten().sort().values
    n = u.numel()
    assert 1 - eps < u[0]
    assert u[-1] < 1 + eps
    expected = (u - (1 - eps)) / (2 * eps)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    assert torch.maximum((expected - steps[:-1]).abs(), (expected - steps[1:]).abs()).max() < 1.63 / math.sqrt(n)


def test_nothing_is_drawn_at_zero() -> None:
    x = torch.randn(S, B, H)
    assert dropout(x, 0.0, where=somewhere(), name="x") is x
    assert jitter(x, 0.0, where=somewhere(), name="x") is x


@pytest.mark.parametrize(("draw", "amount"), [(dropout, 1.0), (dropout, -0.1), (jitter, 1.5), (jitter, -0.1)])
def test_amounts_out_of_range_are_refused(draw: Any, amount: float) -> None:
    with pytest.raises(ValueError, match=str(amount)):
        draw(torch.ones(S, B, H), amount, where=somewhere(), name="x")


def test_draws_never_change() -> None:
    # A run that is continued by a later version must go on with the same masks.
    assert stream_key(7, "layers.0.mixer") == (3014438206, 2661669849)
    kept = drop(torch.ones(S, B, H), somewhere())[0, 0, :12] != 0
    assert kept.int().tolist() == [1, 1, 1, 0, 1, 1, 0, 1, 0, 1, 1, 0]


def test_rows_of_experts_draw_by_token_expert_and_feature_wherever_they_lie() -> None:
    r, width, p = 300, 10, 0.3
    generator = torch.Generator().manual_seed(0)
    sample, position, expert = (torch.randint(0, n, (r,), generator=generator) for n in (7, 50, 6))
    x = torch.ones(r, width, dtype=torch.float64)

    def drawn(rows: torch.Tensor, features: slice, **changes: object) -> torch.Tensor:
        of = {"key": stream_key(1, "layer"), "step": 2, "first_feature": features.start, "width": width}
        place = {"sample": sample[rows], "position": position[rows], "expert": expert[rows]}
        return dropout_of_rows(x[rows][:, features], p, RowsOf(**{**of, **place, "limits": USUAL, **changes}))

    every, all_features = torch.arange(r), slice(0, width)
    whole = drawn(every, all_features)
    assert set(whole.unique().tolist()) == {0.0, 1 / (1 - p)}
    assert abs((whole == 0).double().mean() - p) < 0.03
    some = torch.randperm(r, generator=generator)[:50]
    for features in (slice(0, 5), slice(5, 10), slice(3, 4)):
        assert torch.equal(drawn(some, features), whole[some][:, features])
    for changes in ({"step": 3}, {"key": stream_key(2, "layer")}, {"expert": expert + 1}, {"position": position + 1}):
        assert not torch.equal(drawn(every, all_features, **changes), whole)
    columns = torch.stack([drawn(every[:1].expand(6), all_features, expert=torch.arange(6))[e] for e in range(6)])
    assert len({tuple(row.tolist()) for row in columns}) > 3  # experts of one token draw each their own
    assert torch.equal(drawn(every, all_features, limits=replace(USUAL, factors_on_cpu=40)), whole)
