"""Flat buckets: every gradient once, in rows by rank, summed over micro-batches and ranks in at least fp32."""

import pytest
import torch
from rank_pool import run_mesh
from torch import Tensor, nn

from meshwright.kernels.limits import USUAL
from meshwright.parallel.mesh import Mesh, Sizes, single_process_mesh
from meshwright.parallel.placement import WHOLE, chunk_bounds
from meshwright.parallel.zero.buckets import BucketEngine
from meshwright.parallel.zero.engine import shard

# Over three ranks: 2, 2 and 1 rows; 1, 0 and 0; 3, 3 and 1; 1, 1 and 1.
SHAPES = {"a": (5, 3), "b": (1,), "c": (7, 2, 2), "d": (3,)}
BY_RANK = Sizes(dp_shard=3)


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for name, s in SHAPES.items()}


def engine_of(
    held: dict[str, nn.Parameter],
    mesh: Mesh,
    *,
    shard_state: bool,
    take_at_end: bool = False,
    size: int = USUAL.bucket_bytes,
) -> BucketEngine:
    table = dict.fromkeys(held, WHOLE)
    return BucketEngine(held, table, mesh, shard_state=shard_state, take_at_end=take_at_end, bucket_bytes=size)


def gradient(name: str, rank: int, micro_batch: int) -> Tensor:
    seed = 1000 * rank + 10 * micro_batch + list(SHAPES).index(name)
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed))


def backward(held: dict[str, nn.Parameter], rank: int, micro_batch: int, *, without: str = "") -> None:
    terms = [(p * gradient(name, rank, micro_batch)).sum() for name, p in held.items() if name != without]
    torch.stack(terms).sum().backward()


def step_of(
    mesh: Mesh, shard_state: bool, micro_batches: int, size: int = USUAL.bucket_bytes
) -> dict[str, tuple[Tensor, Tensor, tuple[int, ...]]]:
    held = parameters()
    engine = engine_of(held, mesh, shard_state=shard_state, size=size)
    for step in range(2):  # the second must not see the first
        engine.start_step(micro_batches)
        for micro_batch in range(micro_batches):
            backward(held, mesh.rank, 100 * step + micro_batch)
        engine.finish_gradients()
    for part in engine.parts.values():
        part.parameter.sub_(part.parameter.grad)
    with torch.no_grad():
        engine.publish_weights()
    return {
        name: (part.parameter.grad.clone(), held[name].detach().clone(), part.offset)
        for name, part in engine.parts.items()
    }


@pytest.mark.parametrize("size", [64, 32 << 20])  # each parameter in a bucket of its own, and all in one
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("shard_state", [False, True])
def test_parts_hold_the_sum_of_all_and_the_updated_weights_come_back(
    shard_state: bool, micro_batches: int, size: int
) -> None:
    found = run_mesh(BY_RANK, step_of, shard_state, micro_batches, size)
    for name, shape in SHAPES.items():
        summed = sum(gradient(name, r, 100 + m) for r in range(3) for m in range(micro_batches))
        before = parameters()[name].detach()
        for rank, parts in enumerate(found):
            grad, weight, offset = parts[name]
            begin, end = chunk_bounds(shape[0], 3, rank) if shard_state else (0, shape[0])
            torch.testing.assert_close(grad, summed[begin:end])
            assert offset == (begin, *[0] * (len(shape) - 1))
            torch.testing.assert_close(weight, before - summed)  # on every rank whole


def test_buckets_are_closed_when_they_are_full_and_go_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    held = parameters()
    engine = engine_of(held, single_process_mesh(), shard_state=False, size=64)
    assert [[slot.name for slot in bucket.slots] for bucket in engine.buckets] == [["d", "c"], ["b", "a"]]
    launched = []
    for bucket in engine.buckets:
        monkeypatch.setattr(bucket, "launch", lambda name=bucket.slots[0].name: launched.append(name))
    engine.start_step(2)
    backward(held, 0, 0)
    assert launched == []  # sums go on in the next micro-batch
    (held["a"].sum() + held["b"].sum()).backward()
    assert launched == []  # the second is full, but waits for the first, which every rank launches first
    (held["c"].sum() + held["d"].sum()).backward()
    assert launched == ["d", "b"]


def test_a_parameter_without_gradient_is_named() -> None:
    held = parameters()
    engine = engine_of(held, single_process_mesh(), shard_state=False)
    engine.start_step(1)
    backward(held, 0, 0, without="c")
    with pytest.raises(AssertionError, match="c got no gradient in this step"):
        engine.finish_gradients()


def test_a_gradient_that_comes_twice_is_named() -> None:
    held = parameters()
    engine = engine_of(held, single_process_mesh(), shard_state=False)
    engine.start_step(1)
    held["d"].sum().backward()
    with pytest.raises(AssertionError, match="d got more than 1 gradients"):
        held["d"].sum().backward()


def test_a_step_that_was_not_begun_is_found() -> None:
    held = parameters()
    engine = engine_of(held, single_process_mesh(), shard_state=False)
    engine.start_step(1)
    backward(held, 0, 0)
    engine.finish_gradients()
    with pytest.raises(AssertionError, match="was not reduced in this step"):
        engine.finish_gradients()


def test_a_parameter_used_twice_in_one_pass_gets_the_sum_once() -> None:
    held = parameters()
    engine = engine_of(held, single_process_mesh(), shard_state=False)
    engine.start_step(1)
    (held["d"].sum() + (2 * held["d"]).sum() + sum(held[name].sum() for name in "abc")).backward()
    engine.finish_gradients()
    assert engine.parts["d"].parameter.grad.tolist() == [3, 3, 3]


def test_a_parameter_that_one_micro_batch_leaves_out_is_named() -> None:
    held = parameters()
    engine = engine_of(held, single_process_mesh(), shard_state=False)
    engine.start_step(2)
    backward(held, 0, 0, without="d")
    backward(held, 0, 1)
    with pytest.raises(AssertionError, match="d got 1 of 2 gradients in this step"):
        engine.finish_gradients()


def test_gradients_taken_at_the_end_of_a_step_are_the_same_and_begin_anew() -> None:
    held, hooked = parameters(), parameters()
    engine = engine_of(held, single_process_mesh(), shard_state=False, take_at_end=True)
    expected = engine_of(hooked, single_process_mesh(), shard_state=False)
    for step in range(2):
        for one, of in ((engine, held), (expected, hooked)):
            one.start_step(2)
            backward(of, step, 0)
            backward(of, step, 1)
            one.finish_gradients()
        for name, part in engine.parts.items():
            assert torch.equal(part.parameter.grad, expected.parts[name].parameter.grad)


def test_a_parameter_without_gradient_at_the_end_is_named() -> None:
    held = parameters()
    engine = engine_of(held, single_process_mesh(), shard_state=False, take_at_end=True)
    engine.start_step(1)
    backward(held, 0, 0, without="c")
    with pytest.raises(AssertionError, match="c got no gradient in this step"):
        engine.finish_gradients()


def test_small_updates_and_small_gradients_are_not_lost_in_bf16() -> None:
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    engine = engine_of({"w": weight}, single_process_mesh(), shard_state=False)
    master = engine.parts["w"].parameter
    assert master.dtype == torch.float32
    for step in range(2):
        engine.start_step(4)
        for above in [256.0, 1.0, 1.0, 1.0]:  # in bf16 256 + 1 is 256
            (weight * above).sum().backward()
        engine.finish_gradients()
        assert master.grad.dtype == torch.float32
        assert master.grad.tolist() == [259.0] * 4
        master.add_(2.0**-8)  # half of what bf16 can tell from 1: lost if it were added to the weight itself
        with torch.no_grad():
            engine.publish_weights()
        assert weight.tolist() == [1.0 if step == 0 else 1.0 + 2.0**-7] * 4
    assert weight.dtype == torch.bfloat16


def masters_of_parts(mesh: Mesh) -> tuple[Tensor, Tensor]:
    held = parameters(torch.bfloat16)
    engine = engine_of(held, mesh, shard_state=True)
    for part in engine.parts.values():
        part.parameter.copy_(torch.full_like(part.parameter, 1 + 2.0**-12 + mesh.rank))
    with torch.no_grad():
        engine.publish_weights()
    return engine.parts["c"].parameter, held["c"].detach()


def test_bf16_weights_are_gathered_from_the_fp32_parts_of_all_ranks() -> None:
    for rank, (part, weight) in enumerate(run_mesh(BY_RANK, masters_of_parts)):
        assert part.unique().tolist() == [pytest.approx(1 + 2.0**-12 + rank, abs=1e-7)]
        assert [row.unique().tolist() for row in weight.flatten(1)] == [[1.0]] * 3 + [[2.0]] * 3 + [[3.0]]


def published_twice(mesh: Mesh) -> list[Tensor]:
    held = parameters(torch.bfloat16)
    engine, seen = engine_of(held, mesh, shard_state=True), []
    for update in (1, 2):
        for part in engine.parts.values():
            part.parameter.copy_(torch.full_like(part.parameter, 8 * update + mesh.rank + 2.0**-12))
        with torch.no_grad():
            engine.publish_weights()
        seen.append(held["c"].detach().clone())
    return seen


def test_each_update_reaches_the_bf16_weights_of_all_ranks() -> None:
    for first, second in run_mesh(Sizes(dp_shard=2), published_twice):
        assert [row.unique().tolist() for row in first.flatten(1)] == [[8.0]] * 4 + [[9.0]] * 3
        assert [row.unique().tolist() for row in second.flatten(1)] == [[16.0]] * 4 + [[17.0]] * 3


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.0))


@pytest.mark.parametrize("stage", [0, 1])
def test_a_parameter_without_dims_is_refused(stage: int) -> None:
    model, mesh = Scalar(), single_process_mesh()
    with pytest.raises(ValueError, match=r"temperature has no dims.*give it the shape \[1\]"):
        shard(model, [], {"temperature": WHOLE}, mesh, stage=stage, device=torch.device("cpu"))
