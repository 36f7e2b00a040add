"""A small training run on any layout, reported in global terms, for the tests to compare.

It drives the engine as the training loop does, on random tokens: what it returns on one process is the definition.
No size divides by another, so that every cut is uneven: a norm of 6 over four ranks is 2, 2, 2 and nothing.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from strict_group import inside_a_step
from torch import Tensor

from meshwright.launcher.runfile.tables import OptimizerConfig
from meshwright.launcher.training.optimizer import Optimizer
from meshwright.model.config import ModelConfig
from meshwright.model.kinds.feedforward.moe import MoeConfig
from meshwright.model.kinds.unread import keys_read
from meshwright.model.making import Ways
from meshwright.model.parts import build_model, reset_buffers
from meshwright.model.stack import LanguageModel
from meshwright.model.stage import HeldStages, MicroBatch, stage_parts
from meshwright.parallel.apply import Plan, apply, fill_initial_weights
from meshwright.parallel.collectives import all_reduce
from meshwright.parallel.config import ContextWay
from meshwright.parallel.context.order import zigzag_positions
from meshwright.parallel.grad_norm import clip_gradients, gradient_norm
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.pipeline.adapter import Pipeline
from meshwright.parallel.pipeline.cut import cut_layers
from meshwright.parallel.pipeline.orders import Stages
from meshwright.parallel.placement import placement_table
from meshwright.parallel.tally import Tally, declared_entries, everyones_entries
from meshwright.parallel.where import place
from meshwright.parallel.zero.engine import ZeroEngine
from meshwright.parallel.zero.part import Part

SEQ, BATCH, VOCAB = 12, 8, 37


@dataclass
class Trace:
    """What a run showed, step by step, and the weights at both ends, all global."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    tallies: list[dict[str, list[float]]] = field(default_factory=list)
    initial: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


class Samples(NamedTuple):
    """How the positions of a sample see each other."""

    context: ContextWay = "ring"
    mask_documents: bool = False


CAUSAL = Samples()


@dataclass
class Run:
    """One rank's model, engine and tally."""

    mesh: Mesh
    model: LanguageModel
    engine: ZeroEngine
    tally: Tally
    hidden_size: int
    pipeline: Pipeline | None = None
    samples: Samples = CAUSAL


def dense_config(**changes: object) -> ModelConfig:
    sizes = {"pattern": "*-", "num_layers": 2, "hidden_size": 22, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
    keys = {**sizes, "ffn_hidden_size": 52, "vocab_size": VOCAB, **changes}
    of_parts = {key: keys[key] for key in ("num_heads", "num_kv_heads", "head_dim", "ffn_hidden_size")}
    read = keys_read(str(keys["pattern"]), of_parts)
    return ModelConfig(**{key: value for key, value in keys.items() if key in read or key not in of_parts})


def moe_config(**changes: object) -> ModelConfig:
    moe = {"num_experts": 6, "top_k": 2, "expert_hidden_size": 20, "num_shared_experts": 1}
    moe |= {key: changes.pop(key) for key in list(changes) if key in MoeConfig.model_fields}
    normed = keys_read(str(changes.get("pattern", "*E")), {"qk_norm": True})
    return dense_config(**{"pattern": "*E", **normed, "moe": MoeConfig(**moe), **changes})


def start(
    mesh: Mesh,
    config: ModelConfig,
    plan: Plan,
    *,
    dtype: torch.dtype = torch.float64,
    stages: Stages | None = None,
    samples: Samples = CAUSAL,
) -> Run:
    """Build a model and spread it, as a run does; `stages` where the mesh has a pipeline."""
    stages = stages or Stages("gpipe", 1)
    cut = cut_layers([1.0] * config.num_layers, stages.count)
    held = HeldStages({stage: cut[stage] for stage in stages.held_by(mesh.pp.rank)}, stages.count)
    model = build_model(config, mesh=mesh, device="meta", dtype=dtype, held=held, ways=Ways(samples.context))
    table = placement_table(model)
    tally = Tally({"loss": 1, **everyones_entries(declared_entries(model), mesh.pp)})
    layers = model.held_layers
    experts = [module for layer in layers for name, module in layer.named_modules() if name.endswith("experts")]
    parts = stage_parts(model, held) if mesh.pp.is_split else {}
    if parts:
        plan = replace(plan, schedule="split backward" if stages.splits_backward else "whole backward")
    units = [*experts, *layers, *(parts.values() or [model])]
    engine = apply(model, layers, units, table, mesh, tally, plan, torch.device("cpu"))
    fill_initial_weights(model, engine, seed=5)
    reset_buffers(model)
    pipeline = Pipeline(parts, stages, mesh.pp, torch.device("cpu"), plan.compute_dtype or dtype) if parts else None
    return Run(mesh, model, engine, tally, config.hidden_size, pipeline, samples)


def train(
    mesh: Mesh,
    config: ModelConfig,
    plan: Plan,
    *,
    dtype: torch.dtype = torch.float64,
    steps: int = 2,
    micro_batch: int = 1,
    stages: Stages | None = None,
    samples: Samples = CAUSAL,
    muon: OptimizerConfig | None = None,
) -> Trace:
    """Train a few steps with AdamW or Muon, and clipping; some targets are padding, unevenly over the samples."""
    run, trace = start(mesh, config, plan, dtype=dtype, stages=stages, samples=samples), Trace()
    parts = run.engine.parts
    trace.initial = gather_all(run, [part.parameter for part in parts.values()])
    if muon is None:
        update = torch.optim.AdamW([p.parameter for p in parts.values() if p.parameter.numel()], lr=0.01).step
    else:
        update = partial(Optimizer(parts, muon, mesh).step, 0.01)
    for step in range(steps):
        loss_sum = forward_backward(run, step, micro_batch)
        trace.norms.append(gradient_norm(parts.values(), mesh.pp))
        if step == 0:
            trace.gradients = gather_all(run, [part.parameter.grad for part in parts.values()])
        # Far below the norm, so that every step is clipped; clipping by a norm that leaves something out shows.
        clip_gradients(parts.values(), trace.norms[-1], 0.1)
        update()
        run.engine.publish_weights()
        run.tally.add("loss", loss_sum)
        sums = run.tally.reduce(mesh)
        for module in run.model.modules():
            if hasattr(module, "finish_step"):
                module.finish_step(sums)
        trace.losses.append(sums["loss"].item())
        trace.tallies.append({name: value.tolist() for name, value in sums.items() if name != "loss"})
    trace.weights = gather_all(run, [part.parameter for part in parts.values()])
    return trace


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    """Return the step's tokens and targets; every sample has another number of counted ones, 3, 6 and 7 have none.

    In every second sample all documents begin with one word: where documents are apart these are equal in every layer,
    and so are their rankings to whoever chooses among tokens.
    """
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, VOCAB, (SEQ, BATCH), generator=generator)
    tokens[:, ::2] = tokens[:, ::2].masked_fill(_begins(step)[:, ::2], 0)
    targets = torch.randint(0, VOCAB, (SEQ, BATCH), generator=generator)
    for sample in range(BATCH):
        targets[SEQ - sample * 2 :, sample] = -100
    targets[:, [3, 6, 7]] = -100  # of four ranks the last has no counted token at all
    return tokens, targets


def documents_of(step: int) -> Tensor:
    """Return each token's document; samples have another number of them each, from one up to one for each token."""
    return _begins(step).long().cumsum(0)


def _begins(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(200 + step)
    return torch.rand(SEQ, BATCH, generator=generator) < torch.linspace(0, 1, BATCH)


def forward_backward(run: Run, step: int, micro_batch: int) -> Tensor:
    """Run this rank's samples of a step forward and backward; return its share of the loss."""
    per_rank = BATCH // run.mesh.dp.size
    starts = range(run.mesh.dp.rank * per_rank, (run.mesh.dp.rank + 1) * per_rank, micro_batch)
    run.engine.start_step(len(starts))
    micro_batches = [micro_batch_of(run, step, begin, micro_batch) for begin in starts]
    if run.pipeline is not None:
        for part in run.pipeline.parts.values():
            part.start_step(micro_batches, run.tally)
        held = len(micro_batches[0].where.position)
        total = run.pipeline.step(len(starts), (held, micro_batch, run.hidden_size)).double()
    else:
        total = torch.zeros((), dtype=torch.float64)
        for each in micro_batches:
            loss = run.model(each.tokens, each.targets, each.where, run.tally)
            loss.backward()
            total += loss.detach().double()
    run.engine.finish_gradients()
    return total


def micro_batch_of(run: Run, step: int, begin: int, size: int) -> MicroBatch:
    tokens, targets = batch_of(step)
    some = slice(begin, begin + size)
    where = place(
        torch.arange(begin, begin + size),
        documents_of(step)[:, some],
        targets[:, some] != -100,
        zigzag_positions(SEQ, run.mesh.cp),
        run.mesh.tp,
        step=step,
        step_tokens=float((targets != -100).sum()),
        mask_documents=run.samples.mask_documents,
        whole_tokens=(tokens[:, some], targets[:, some]),
    )
    mine = where.position_mixed
    return MicroBatch(tokens[mine, some], targets[mine, some], where)


def gather_all(run: Run, held: list[Tensor]) -> dict[str, Tensor]:
    """Return every stage's global tensors, of which `held` are this rank's parts in the order of the engine's."""
    parts = run.engine.parts
    return of_all_stages(run, {name: gather(part, one) for (name, part), one in zip(parts.items(), held, strict=True)})


def of_all_stages(run: Run, mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what every stage has gathered; what several have must be the same."""
    if not run.mesh.pp.is_split:
        return mine
    of_stages: list[dict[str, Tensor]] = [{}] * run.mesh.pp.size
    with inside_a_step(False):
        dist.all_gather_object(of_stages, mine, group=run.mesh.pp.group)
    for stage in of_stages:
        for name in stage.keys() & mine.keys():
            assert torch.equal(stage[name], mine[name]), f"two stages hold different copies of {name}"
    return {name: tensor for stage in of_stages for name, tensor in stage.items()}


def gather(part: Part, held: Tensor) -> Tensor:
    """Return the global tensor of which `held` is this rank's part."""
    whole = torch.zeros(part.global_shape, dtype=torch.float64)
    real = part.real(held).shape
    cut = tuple(slice(begin, begin + size) for begin, size in zip(part.offset, real, strict=True))
    whole[cut] = part.real(held.detach()).double()
    for axis in part.split_axes:
        all_reduce(whole, axis)
    return whole / prod(split.copies for split in part.placement.splits)


def assert_same(trace: Trace, expected: Trace) -> None:
    """Hold a layout to one process: initial weights bitwise, counts exactly, the rest up to the order of sums."""
    for name, value in expected.initial.items():
        assert torch.equal(trace.initial[name], value), f"initial {name} is not bitwise the same"
    # fp64 sums of a few thousand terms in another order: 1e-9 of each tensor's largest value (promise 2).
    assert trace.losses == pytest.approx(expected.losses, rel=1e-9)
    assert trace.norms == pytest.approx(expected.norms, rel=1e-9)
    for ours, theirs in zip(trace.tallies, expected.tallies, strict=True):
        for key, value in theirs.items():
            assert ours[key] == (value if key.endswith("load") else pytest.approx(value, rel=1e-9)), key
    for kind in ("gradients", "weights"):
        for name, value in getattr(expected, kind).items():
            error = (getattr(trace, kind)[name] - value).abs().max()
            assert error <= 1e-9 * value.abs().max(), f"{kind} of {name} differ by {error}"
