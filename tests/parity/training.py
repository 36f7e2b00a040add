"""A small training run on any layout, reported in global terms, for the parity tests to compare.

It drives the engine as the training loop does, on random tokens: what it returns on one process is the definition.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from meshwright.model.config import ModelConfig, MoeConfig
from meshwright.model.parts import build_model, reset_buffers
from meshwright.parallel.apply import Plan, apply, fill_initial_weights
from meshwright.parallel.collectives import all_reduce
from meshwright.parallel.grad_norm import clip_gradients, gradient_norm
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.placement import placement_table
from meshwright.parallel.tally import Tally, declared_entries
from meshwright.parallel.where import Where
from meshwright.parallel.zero.part import Part

SEQ, BATCH, VOCAB = 12, 8, 40


@dataclass
class Trace:
    """What a run showed, step by step, and the weights at both ends, all global."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    tallies: list[dict[str, list[float]]] = field(default_factory=list)
    initial: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


def dense_config(**changes: object) -> ModelConfig:
    sizes = dict(pattern="*-", num_layers=2, hidden_size=24, num_heads=4, num_kv_heads=2, head_dim=8)
    return ModelConfig(**{**sizes, "ffn_hidden_size": 52, "vocab_size": VOCAB, **changes})


def moe_config(**changes: object) -> ModelConfig:
    moe = dict(num_experts=4, top_k=2, expert_hidden_size=20, num_shared_experts=1)
    moe |= {key: changes.pop(key) for key in list(changes) if key in MoeConfig.model_fields}
    return dense_config(**{"pattern": "*E", "qk_norm": True, "moe": MoeConfig(**moe), **changes})


def train(
    mesh: Mesh,
    config: ModelConfig,
    plan: Plan,
    *,
    dtype: torch.dtype = torch.float64,
    steps: int = 3,
    micro_batch: int = 1,
    learning_rate: float = 0.01,
) -> Trace:
    """Train a few steps with AdamW and clipping; some targets are padding, unevenly over the samples."""
    trace = Trace()
    model = build_model(config, mesh=mesh, device="meta", dtype=dtype)
    table = placement_table(model)
    tally = Tally({"loss": 1, **declared_entries(model)})
    layers = list(model.layers.values())
    experts = [layer.feedforward.part.experts for layer in layers if hasattr(layer.feedforward.part, "experts")]
    engine = apply(model, layers, [*experts, *layers, model], table, mesh, tally, plan, torch.device("cpu"))
    fill_initial_weights(model, engine, seed=5)
    reset_buffers(model)
    trace.initial = {name: gather(part, part.parameter) for name, part in engine.parts.items()}
    optimizer = torch.optim.AdamW([p.parameter for p in engine.parts.values() if p.parameter.numel()], lr=learning_rate)
    for step in range(steps):
        loss_sum = _one_step(mesh, model, engine, tally, step, micro_batch)
        trace.norms.append(gradient_norm(engine.parts.values()))
        if step == 0:
            trace.gradients = {name: gather(part, part.parameter.grad) for name, part in engine.parts.items()}
        clip_gradients(engine.parts.values(), trace.norms[-1], 1.0)
        optimizer.step()
        engine.publish_weights()
        tally.add("loss", loss_sum)
        sums = tally.reduce(mesh)
        for module in model.modules():
            if hasattr(module, "finish_step"):
                module.finish_step(sums)
        trace.losses.append(sums["loss"].item())
        trace.tallies.append({name: value.tolist() for name, value in sums.items() if name != "loss"})
    trace.weights = {name: gather(part, part.parameter) for name, part in engine.parts.items()}
    return trace


def _one_step(mesh: Mesh, model, engine, tally, step: int, micro_batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, VOCAB, (SEQ, BATCH), generator=generator)
    targets = torch.randint(0, VOCAB, (SEQ, BATCH), generator=generator)
    for sample in range(BATCH):  # every sample has another number of counted tokens; sample 3 has none
        targets[SEQ - sample * 2 :, sample] = -100
    targets[:, 3] = -100
    per_rank = BATCH // mesh.dp.size
    mine = range(mesh.dp.rank * per_rank, (mesh.dp.rank + 1) * per_rank)
    starts = mine[::micro_batch]
    total = torch.zeros((), dtype=torch.float64)
    for start in starts:
        some = slice(start, start + micro_batch)
        where = Where(
            step=step,
            sample=torch.arange(start, start + micro_batch),
            position=torch.arange(SEQ),
            document=torch.zeros(SEQ, micro_batch, dtype=torch.int64),
            counted=targets[:, some] != -100,
            step_tokens=float((targets != -100).sum()),
            seq_len=SEQ,
        )
        engine.start_micro_batch(is_first=start == starts[0], is_last=start == starts[-1])
        loss = model(tokens[:, some], targets[:, some], where, tally)
        loss.backward()
        total += loss.detach().double()
    engine.finish_gradients()
    return total


def gather(part: Part, held: Tensor) -> Tensor:
    """Return the global tensor of which `held` is this rank's part."""
    whole = torch.zeros(part.global_shape, dtype=torch.float64)
    cut = tuple(slice(begin, begin + size) for begin, size in zip(part.offset, held.shape, strict=True))
    whole[cut] = held.detach().double()
    for axis in part.split_axes:
        all_reduce(whole, axis)
    return whole
