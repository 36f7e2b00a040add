"""Every ZeRO stage: the same gradients in bf16 too, the memory that the table of engine.py promises, fresh weights."""

import gc

import engine_cases
import pytest
import torch
from rank_pool import run_mesh
from torch import Tensor

from meshwright.model.parts import build_model
from meshwright.parallel.apply import Plan
from meshwright.parallel.grad_norm import gradient_norm
from meshwright.parallel.mesh import Mesh, Sizes, single_process_mesh
from meshwright.parallel.placement import Placement
from meshwright.parallel.zero.engine import shard

BF16 = torch.bfloat16
DENSE, MOE = engine_cases.dense_config(num_layers=1), engine_cases.moe_config(num_layers=1)


def bf16_gradients(mesh: Mesh, config: object, stage: int) -> tuple[dict[str, Tensor], float, float]:
    run = engine_cases.start(mesh, config, Plan(stage=stage, compute_dtype=BF16), dtype=torch.float32)
    loss = engine_cases.forward_backward(run, 0, 1)
    parts = run.engine.parts
    assert all(part.parameter.dtype == part.parameter.grad.dtype == torch.float32 for part in parts.values())
    wholes = {name: engine_cases.gather(part, part.parameter.grad) for name, part in parts.items()}
    run.tally.add("loss", loss)
    return wholes, gradient_norm(parts.values()), run.tally.reduce(mesh)["loss"].item()


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(((found[name] - value).abs().max() / value.abs().max()).item() for name, value in expected.items())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_gradients_of_a_dense_model_are_summed_in_fp32_by_every_stage(stage: int) -> None:
    # Each sample is a micro-batch, so its bf16 gradient is the same bits in every layout; what is left is the order
    # of fp32 sums of 8 numbers. A sum in bf16 would be off by 2^-9 = 2e-3.
    expected, norm, loss = bf16_gradients(single_process_mesh(), DENSE, 0)
    for found, norm_found, loss_found in run_mesh(Sizes(dp_shard=2), bf16_gradients, DENSE, stage):
        assert largest_error(found, expected) < 2e-6
        assert norm_found == pytest.approx(norm, rel=1e-6)
        assert loss_found == pytest.approx(loss, rel=1e-6)


def test_bf16_gradients_of_experts_agree_as_far_as_bf16_can() -> None:
    # An expert's gradient is rounded once for the rows of both ranks together here, once for each sample there:
    # 2^-9 of each term, and terms cancel; four of these of the largest element.
    expected, norm, loss = bf16_gradients(single_process_mesh(), MOE, 0)
    by_stage = [run_mesh(Sizes(dp_shard=4, ep=2), bf16_gradients, MOE, stage)[0] for stage in (0, 1, 3)]
    for found, norm_found, loss_found in by_stage:
        assert largest_error(found, expected) < 4 * 2.0**-9
        assert largest_error(found, by_stage[0][0]) < 2e-6  # between stages only fp32 sums differ
        assert norm_found == pytest.approx(norm, rel=2.0**-9)
        assert loss_found == pytest.approx(loss, rel=1e-6)


def live_bytes() -> int:
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def bytes_between_steps(mesh: Mesh, stage: int, compute_dtype: torch.dtype | None) -> tuple[int, int, int]:
    """Return the bytes of this rank's parameters and parts, of the moments, and of all tensors that were added."""
    empty = live_bytes()
    plan = Plan(stage=stage, compute_dtype=compute_dtype)
    run = engine_cases.start(mesh, DENSE, plan, dtype=torch.float32)
    parts = [part.parameter for part in run.engine.parts.values()]
    optimizer = torch.optim.AdamW([part for part in parts if part.numel()], lr=0.01)
    for step in range(2):
        engine_cases.forward_backward(run, step, 2)
        optimizer.step()
        run.engine.publish_weights()
    with torch.no_grad():  # an evaluation must not leave gathered weights behind it after the next publication
        run.model(engine_cases.batch_of(0)[0])
    run.engine.publish_weights()
    held = {}
    for tensor in [*run.model.parameters(), *parts]:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        held[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    moments = sum(s[kind].nbytes for s in optimizer.state.values() for kind in ("exp_avg", "exp_avg_sq"))
    return sum(held.values()), moments, live_bytes() - empty


def expected_bytes(rank: int, stage: int, narrow: bool) -> tuple[int, int]:
    numbers = part_numbers = padded_numbers = 0
    for parameter in engine_cases.start(single_process_mesh(), DENSE, Plan()).model.parameters():
        rows, rest = parameter.shape[0], parameter.numel() // parameter.shape[0]
        numbers += parameter.numel()
        part_numbers += len(torch.arange(rows).chunk(2)[rank]) * rest
        padded_numbers += -(-rows // 2) * rest  # FSDP2 holds a short part in room for a full one
    if stage == 0:
        return numbers * (2 + 4 if narrow else 4), 2 * 4 * numbers
    if stage == 1:  # without bf16, a part is some rows of the weight itself
        return numbers * 2 + part_numbers * 4 if narrow else numbers * 4, 2 * 4 * part_numbers
    return padded_numbers * 4, 2 * 4 * part_numbers


@pytest.mark.parametrize("narrow", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_rank_holds_the_bytes_that_its_stage_promises(stage: int, narrow: bool) -> None:
    found = run_mesh(Sizes(dp_shard=2), bytes_between_steps, stage, BF16 if narrow else None)
    for rank, (weights, moments, everything) in enumerate(found):
        assert (weights, moments) == expected_bytes(rank, stage, narrow)
        if stage >= 2:
            # Gradients lie in parts of the weights' size. Nothing that was gathered is left: it would be as much
            # again. The tally and the optimizer's counters are some hundred bytes.
            assert everything < weights + moments + weights + 1000


def bytes_gathered_by_a_forward_pass(mesh: Mesh, stage: int) -> int:
    run = engine_cases.start(mesh, DENSE, Plan(stage=stage), dtype=torch.float32)
    before = live_bytes()
    with torch.no_grad():
        run.model(engine_cases.batch_of(0)[0])
    return live_bytes() - before


def test_zero_2_keeps_gathered_weights_for_the_backward_pass_and_zero_3_does_not() -> None:
    whole = sum(p.nbytes for p in build_model(DENSE).parameters())
    kept, let_go = (run_mesh(Sizes(dp_shard=2), bytes_gathered_by_a_forward_pass, stage) for stage in (2, 3))
    assert all(found >= whole for found in kept)
    assert all(found < 0.1 * whole for found in let_go)


def after_an_evaluation(mesh: Mesh, stage: int) -> tuple[Tensor, Tensor]:
    run = engine_cases.start(mesh, DENSE, Plan(stage=stage))
    tokens = engine_cases.batch_of(0)[0]
    with torch.no_grad():
        run.model(tokens)
        for part in run.engine.parts.values():
            part.parameter.mul_(1.5)
    run.engine.publish_weights()
    fresh = engine_cases.start(single_process_mesh(), DENSE, Plan())
    with torch.no_grad():
        for parameter in fresh.model.parameters():
            parameter.mul_(1.5)
        return run.model(tokens), fresh.model(tokens)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_weights_that_change_after_an_evaluation_are_the_ones_computed_with(stage: int) -> None:
    for found, expected in run_mesh(Sizes(dp_shard=2), after_an_evaluation, stage):
        torch.testing.assert_close(found, expected)


def complaint_of_a_step(mesh: Mesh, stage: int, fault: str) -> str:
    """Leave a layer's reduction out, or make one more, and return what is said of it."""
    run = engine_cases.start(mesh, DENSE, Plan(stage=stage))
    layer = next(iter(run.model.layers.values()))
    if fault == "left out":
        layer.set_requires_gradient_sync(False)
    try:
        engine_cases.forward_backward(run, 0, 1)
        if fault == "twice":
            tokens, targets = engine_cases.batch_of(0)
            run.model(tokens, targets).backward()
            run.engine.finish_gradients()
    except AssertionError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("stage", [2, 3])
def test_a_reduction_that_is_left_out_or_made_twice_is_found(stage: int) -> None:
    # Two samples on each of four ranks, a micro-batch each; units are the layer and what is around it.
    sizes = Sizes(dp_shard=4)
    assert run_mesh(sizes, complaint_of_a_step, stage, "") == [""] * 4
    for found in run_mesh(sizes, complaint_of_a_step, stage, "left out"):
        assert found == "in 2 micro-batches the units were reduced [0, 2] times"
    for found in run_mesh(sizes, complaint_of_a_step, stage, "twice"):
        assert found == "in 2 micro-batches the units were reduced [3, 3] times"


def partial_sum(mesh: Mesh, stage: int) -> list[float]:
    model = torch.nn.Linear(3, 1, bias=False, device="meta")
    table = {"weight": Placement(grad_sum=(mesh.tp,))}
    engine = shard(model, [model], table, mesh, stage=stage, device=torch.device("cpu"))
    engine.start_step(1)
    model(torch.full((1, 3), 10.0**mesh.rank)).sum().backward()
    engine.finish_gradients()
    return engine.parts["weight"].parameter.grad.flatten().tolist()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_gradient_that_is_a_part_on_each_rank_is_summed_over_its_axes_too(stage: int) -> None:
    # One row over dp_shard = 2: the ranks 0 and 1 (tp) of the first dp rank hold it, the others hold nothing.
    assert run_mesh(Sizes(dp_shard=2, tp=2), partial_sum, stage) == [[1111.0] * 3] * 2 + [[]] * 2
