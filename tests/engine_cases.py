"""A small training run on any layout, reported in global terms, for the tests to compare.

It drives the engine as the training loop does, on random tokens: what it returns on one process is the definition.
No size divides by another, so that every cut is uneven: a norm of 6 over four ranks is 2, 2, 2 and nothing.
"""

from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from meshwright.model.config import ModelConfig, MoeConfig
from meshwright.model.parts import build_model, reset_buffers
from meshwright.model.stack import LanguageModel
from meshwright.parallel.apply import Plan, apply, fill_initial_weights
from meshwright.parallel.collectives import all_reduce
from meshwright.parallel.grad_norm import clip_gradients, gradient_norm
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.placement import placement_table
from meshwright.parallel.tally import Tally, declared_entries
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


@dataclass
class Run:
    """One rank's model, engine and tally."""

    mesh: Mesh
    model: LanguageModel
    engine: ZeroEngine
    tally: Tally


def dense_config(**changes: object) -> ModelConfig:
    sizes = {"pattern": "*-", "num_layers": 2, "hidden_size": 22, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
    return ModelConfig(**{**sizes, "ffn_hidden_size": 52, "vocab_size": VOCAB, **changes})


def moe_config(**changes: object) -> ModelConfig:
    moe = {"num_experts": 6, "top_k": 2, "expert_hidden_size": 20, "num_shared_experts": 1}
    moe |= {key: changes.pop(key) for key in list(changes) if key in MoeConfig.model_fields}
    return dense_config(**{"pattern": "*E", "qk_norm": True, "moe": MoeConfig(**moe), **changes})


def start(mesh: Mesh, config: ModelConfig, plan: Plan, *, dtype: torch.dtype = torch.float64) -> Run:
    """Build a model and spread it, as a run does."""
    model = build_model(config, mesh=mesh, device="meta", dtype=dtype)
    table = placement_table(model)
    tally = Tally({"loss": 1, **declared_entries(model)})
    layers = list(model.layers.values())
    experts = [layer.feedforward.part.experts for layer in layers if hasattr(layer.feedforward.part, "experts")]
    engine = apply(model, layers, [*experts, *layers, model], table, mesh, tally, plan, torch.device("cpu"))
    fill_initial_weights(model, engine, seed=5)
    reset_buffers(model)
    return Run(mesh, model, engine, tally)


def train(
    mesh: Mesh,
    config: ModelConfig,
    plan: Plan,
    *,
    dtype: torch.dtype = torch.float64,
    steps: int = 2,
    micro_batch: int = 1,
    learning_rate: float = 0.01,
) -> Trace:
    """Train a few steps with AdamW and clipping; some targets are padding, unevenly over the samples."""
    run, trace = start(mesh, config, plan, dtype=dtype), Trace()
    parts = run.engine.parts
    trace.initial = {name: gather(part, part.parameter) for name, part in parts.items()}
    optimizer = torch.optim.AdamW([p.parameter for p in parts.values() if p.parameter.numel()], lr=learning_rate)
    for step in range(steps):
        loss_sum = forward_backward(run, step, micro_batch)
        trace.norms.append(gradient_norm(parts.values()))
        if step == 0:
            trace.gradients = {name: gather(part, part.parameter.grad) for name, part in parts.items()}
        # Far below the norm, so that every step is clipped; clipping by a norm that leaves something out shows.
        clip_gradients(parts.values(), trace.norms[-1], 0.1)
        optimizer.step()
        run.engine.publish_weights()
        run.tally.add("loss", loss_sum)
        sums = run.tally.reduce(mesh)
        for module in run.model.modules():
            if hasattr(module, "finish_step"):
                module.finish_step(sums)
        trace.losses.append(sums["loss"].item())
        trace.tallies.append({name: value.tolist() for name, value in sums.items() if name != "loss"})
    trace.weights = {name: gather(part, part.parameter) for name, part in parts.items()}
    return trace


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    """Return the step's tokens and targets; every sample has another number of counted ones, 3, 6 and 7 have none."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, VOCAB, (SEQ, BATCH), generator=generator)
    targets = torch.randint(0, VOCAB, (SEQ, BATCH), generator=generator)
    for sample in range(BATCH):
        targets[SEQ - sample * 2 :, sample] = -100
    targets[:, [3, 6, 7]] = -100  # of four ranks the last has no counted token at all
    return tokens, targets


def forward_backward(run: Run, step: int, micro_batch: int) -> Tensor:
    """Run this rank's samples of a step forward and backward; return its share of the loss."""
    tokens, targets = batch_of(step)
    per_rank = BATCH // run.mesh.dp.size
    starts = range(run.mesh.dp.rank * per_rank, (run.mesh.dp.rank + 1) * per_rank, micro_batch)
    total = torch.zeros((), dtype=torch.float64)
    for begin in starts:
        some = slice(begin, begin + micro_batch)
        where = place(
            torch.arange(begin, begin + micro_batch),
            torch.zeros(SEQ, micro_batch, dtype=torch.int64),
            targets[:, some] != -100,
            torch.arange(SEQ),
            run.mesh.tp,
            step=step,
            step_tokens=float((targets != -100).sum()),
        )
        mine = where.position_mixed
        run.engine.start_micro_batch(is_first=begin == starts[0], is_last=begin == starts[-1])
        loss = run.model(tokens[mine, some], targets[mine, some], where, run.tally)
        loss.backward()
        total += loss.detach().double()
    run.engine.finish_gradients()
    return total


def gather(part: Part, held: Tensor) -> Tensor:
    """Return the global tensor of which `held` is this rank's part."""
    whole = torch.zeros(part.global_shape, dtype=torch.float64)
    real = part.real(held).shape
    cut = tuple(slice(begin, begin + size) for begin, size in zip(part.offset, real, strict=True))
    whole[cut] = part.real(held.detach()).double()
    for axis in part.split_axes:
        all_reduce(whole, axis)
    return whole / prod(split.copies for split in part.placement.splits)
