"""What the ranks of benchmarks/layouts.py do: steps of one model under one layout after the other, and sums; timed."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from meshwright.model.config import ModelConfig
from meshwright.model.kinds.feedforward.moe import MoeConfig
from meshwright.model.parts import build_model, reset_buffers
from meshwright.model.stage import HeldStages, MicroBatch, stage_parts
from meshwright.parallel import collectives
from meshwright.parallel.apply import Plan, apply, fill_initial_weights
from meshwright.parallel.context.order import zigzag_positions
from meshwright.parallel.mesh import Mesh, Sizes, build_mesh
from meshwright.parallel.pipeline.adapter import Pipeline
from meshwright.parallel.pipeline.cut import cut_layers
from meshwright.parallel.pipeline.orders import Stages
from meshwright.parallel.placement import placement_table
from meshwright.parallel.tally import Tally, declared_entries, everyones_entries
from meshwright.parallel.where import place

SEQ, BATCH, VOCAB, MICRO = 64, 8, 1024, 2
# By name: how many processes.
LAYOUTS_OF_TWO = {
    "one process": 1, "DP2, ZeRO-1": 2, "TP2": 2, "PP2, 1F1B, 4 micro-batches": 2, "CP2, ring": 2,
    "one process, MoE": 1, "EP2, MoE, ZeRO-1": 2,
}  # fmt: skip
STEPS = 3
CONTESTANTS = ("ZeRO-1", "DDP", "DDP + ZeroRedundancyOptimizer", "FSDP2", "ZeRO-3")


def dense_of(width: int) -> ModelConfig:
    """Return a dense model of four layers of this width."""
    heads = width // 32
    return ModelConfig(
        pattern="*-",
        num_layers=4,
        hidden_size=width,
        num_heads=heads,
        num_kv_heads=heads // 2,
        head_dim=32,
        ffn_hidden_size=3 * width,
        vocab_size=VOCAB,
    )


def moe_of(width: int) -> ModelConfig:
    """Return the same with a mixture of eight experts in each layer, two for each token."""
    moe = MoeConfig(num_experts=8, top_k=2, expert_hidden_size=3 * width // 2)
    return dense_of(width).model_copy(update={"pattern": "*E", "moe": moe})


def tokens() -> tuple[Tensor, Tensor]:
    """Return the whole batch."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randint(0, VOCAB, (SEQ, BATCH), generator=generator) for _ in range(2))  # type: ignore[return-value]


def micro_batches(mesh: Mesh) -> list[MicroBatch]:
    """Return this rank's samples of the batch, two at a time."""
    whole, targets = tokens()
    per_rank, found = BATCH // mesh.dp.size, []
    for begin in range(mesh.dp.rank * per_rank, (mesh.dp.rank + 1) * per_rank, MICRO):
        some = slice(begin, begin + MICRO)
        mine = zigzag_positions(SEQ, mesh.cp)
        where = place(
            torch.arange(begin, begin + MICRO),
            torch.zeros(SEQ, MICRO, dtype=torch.int64),
            torch.ones(SEQ, MICRO, dtype=torch.bool),
            mine,
            mesh.tp,
            step=0,
            step_tokens=float(SEQ * BATCH),
        )
        found.append(MicroBatch(whole[mine, some], targets[mine, some], where))
    return found


def our_step(mesh: Mesh, config: ModelConfig, stage: int) -> Callable[[], None]:
    """Return what makes one step of ours."""
    stages = Stages("1f1b", mesh.pp.size, 1) if mesh.pp.is_split else Stages("gpipe", 1)
    cut = cut_layers([1.0] * config.num_layers, stages.count)
    held = HeldStages({at: cut[at] for at in stages.held_by(mesh.pp.rank)}, stages.count)
    model = build_model(config, mesh=mesh, device="meta", held=held)
    tally = Tally({"loss": 1, **everyones_entries(declared_entries(model), mesh.pp)})
    layers = list(model.layers.values())
    experts = [layer.feedforward.part.experts for layer in layers if hasattr(layer.feedforward.part, "experts")]
    parts = stage_parts(model, held) if mesh.pp.is_split else {}
    plan = Plan(stage=stage, schedule="whole backward" if parts else "none")
    units, cpu = [*experts, *layers, *(parts.values() or [model])], torch.device("cpu")
    engine = apply(model, layers, units, placement_table(model), mesh, tally, plan, cpu)
    fill_initial_weights(model, engine, seed=1)
    reset_buffers(model)
    pipeline = Pipeline(parts, stages, mesh.pp, cpu, torch.float32) if parts else None
    optimizer = torch.optim.AdamW([p.parameter for p in engine.parts.values() if p.parameter.numel()], fused=True)
    batch = micro_batches(mesh)

    def step() -> None:
        engine.start_step(len(batch))
        if pipeline is None:
            for each in batch:
                model(each.tokens, each.targets, each.where, tally).backward()
        else:
            for part in parts.values():
                part.start_step(batch, tally)
            pipeline.step(len(batch), (SEQ, MICRO, config.hidden_size))
        engine.finish_gradients()
        optimizer.step()
        engine.publish_weights()

    return step


def timed(step: Callable[[], None], steps: int = STEPS) -> tuple[float, float]:
    """Return wall and CPU seconds of one step, of several in a row."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps


def time_layout(name: str, width: int) -> tuple[float, float]:
    """Time the steps of one layout, after one that warms up."""
    axes = {"DP": "dp_shard", "TP": "tp", "PP": "pp", "CP": "cp"}
    sizes = Sizes(**{axes[name[:2]]: 2}) if name[:2] in axes else Sizes()
    sizes = Sizes(dp_shard=2, ep=2) if name.startswith("EP") else sizes
    torch.set_num_threads(2 if sizes.world == 1 else 1)
    step = our_step(build_mesh(sizes), moe_of(width) if "MoE" in name else dense_of(width), 1)
    step()
    return timed(step)


def peer_step(name: str, mesh: Mesh, config: ModelConfig) -> Callable[[], None]:
    """Return what makes one step of torch's own ways, on the same model and samples."""
    model: nn.Module = build_model(config)
    if name == "FSDP2":
        for layer in model.layers.values():  # type: ignore[union-attr,operator]
            fully_shard(layer)
        fully_shard(model)
    else:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if "Zero" in name:
        optimizer: Any = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, fused=True)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = micro_batches(mesh)

    def step() -> None:
        for at, each in enumerate(batch):
            last = at == len(batch) - 1
            if isinstance(model, DistributedDataParallel) and not last:
                with model.no_sync():
                    model(each.tokens, each.targets, each.where).backward()
            else:
                if not isinstance(model, DistributedDataParallel):
                    model.set_requires_gradient_sync(last)  # type: ignore[operator]
                model(each.tokens, each.targets, each.where).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def time_contestants(turns: int, width: int) -> dict[str, list[tuple[float, float]]]:
    """Time every way of data parallelism in turns."""
    mesh = build_mesh(Sizes(dp_shard=2))
    ours = {"ZeRO-1": 1, "ZeRO-3": 3}
    config = dense_of(width)
    steps = {
        name: our_step(mesh, config, ours[name]) if name in ours else peer_step(name, mesh, config)
        for name in CONTESTANTS
    }
    for step in steps.values():
        step()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(turns):
        for name, step in steps.items():
            dist.barrier()
            taken[name].append(timed(step))
    return taken


def time_reduce_scatters(turns: int, sizes: tuple[int, ...]) -> dict[int, dict[str, list[float]]]:
    """Time by size the ways to give each rank its part of a sum of so many fp32 numbers: seconds of the wall."""
    found: dict[int, dict[str, list[float]]] = {}
    for size in sizes:
        x, out = torch.ones(size), torch.empty(size // dist.get_world_size())
        ways: dict[str, Callable[[], Any]] = {
            "gloo": lambda out=out, x=x: collectives._reduce_scatter_flat(out, x),
            "ours": lambda out=out, x=x: collectives.start_reduce_scatter(out, x, None).wait(),
            "all-reduce": lambda x=x: dist.all_reduce(x),
        }
        found[size] = {name: [] for name in ways}
        for turn in range(turns + 2):
            for name, way in ways.items():
                x.fill_(1.0)
                dist.barrier()
                began = time.perf_counter()
                way()
                if turn >= 2:
                    found[size][name].append(time.perf_counter() - began)
    return found
