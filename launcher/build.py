"""From a run file and a mesh to everything that a training loop works with; here the config is spent.

    run file + store + mesh  ->  model (built on meta, split, wrapped, filled), engine, optimizer, tally  ->  Run
    a folder                 ->  a model with weights, on one process, for generation and export

Below this file functions take numbers, axes and modules.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from meshwright.data.store import TokenStore
from meshwright.kernels.limits import USUAL, Limits
from meshwright.launcher.runfile.messages import ConfigError
from meshwright.launcher.runfile.tables import RunFile
from meshwright.launcher.stages import layers_held, stages_of
from meshwright.launcher.training.optimizer import Optimizer
from meshwright.launcher.training.stopping import FLAGS
from meshwright.model.block import RECOMPUTED_WHOLE, RUN_AGAIN
from meshwright.model.config import ModelConfig
from meshwright.model.making import Ways
from meshwright.model.parts import build_model, reset_buffers
from meshwright.model.stack import LanguageModel
from meshwright.model.stage import HeldStages, stage_parts
from meshwright.parallel.apply import Plan, apply, fill_initial_weights
from meshwright.parallel.config import RecomputeConfig
from meshwright.parallel.experts.deep_ep import why_not as why_not_deep_ep
from meshwright.parallel.mesh import Mesh, Sizes
from meshwright.parallel.pipeline.adapter import Pipeline
from meshwright.parallel.placement import placement_table
from meshwright.parallel.recompute.policy import Recompute
from meshwright.parallel.tally import Tally, declared_entries, everyones_entries, take_sums
from meshwright.parallel.zero.engine import ZeroEngine


@dataclass
class Run:
    """What one rank trains with."""

    run_file: RunFile
    store: TokenStore
    mesh: Mesh
    device: torch.device
    model: LanguageModel
    engine: ZeroEngine
    optimizer: Optimizer
    tally: Tally
    pipeline: Pipeline | None
    """What runs the model's stages; None where every rank holds the whole model."""
    limits: Limits = USUAL

    @property
    def folder(self) -> Path:
        """Return the folder that everything of the run is written to."""
        return Path(self.run_file.run.output_folder)

    def finish_step(self, sums: dict[str, Tensor]) -> None:
        """Let every module that watches the step's sums take them."""
        take_sums(self.model, sums)

    def buffers(self) -> dict[str, Tensor]:
        """Return the state that modules keep beside their parameters, by global name, the same on every rank."""
        return dict(self.model.named_buffers())


def build_run(run_file: RunFile, store: TokenStore, mesh: Mesh, device: torch.device, limits: Limits = USUAL) -> Run:
    """Build the model with its initial weights, its optimizer and its tally, as this rank holds them."""
    stages = stages_of(run_file)
    held = HeldStages(layers_held(run_file, mesh.pp.rank), stages.count)
    model = build_model(
        run_file.model,
        mesh=mesh,
        device="meta",
        dtype=held_dtype(run_file),
        held=held,
        ways=Ways(run_file.parallel.context, run_file.parallel.expert_exchange),
    )
    table = placement_table(model)
    ranks = {f"memory.{rank}": 1 for rank in range(mesh.world.size)}
    entries = everyones_entries(declared_entries(model), mesh.pp)
    tally = Tally({"loss": 1, **FLAGS, **ranks, **entries}, device)
    layers = model.held_layers
    parts = stage_parts(model, held) if mesh.pp.is_split else {}
    units = [*_experts(layers), *layers, *(parts.values() or [model])]
    engine = apply(model, layers, units, table, mesh, tally, plan_of(run_file, limits), device)
    fill_initial_weights(model, engine, run_file.run.seed, limits)
    reset_buffers(model)
    optimizer = Optimizer(engine.parts, run_file.optimizer, mesh, limits)
    pipeline = Pipeline(parts, stages, mesh.pp, device, activation_dtype(run_file)) if parts else None
    return Run(run_file, store, mesh, device, model, engine, optimizer, tally, pipeline, limits)


def _experts(layers: list[nn.Module]) -> list[nn.Module]:
    """Return the modules that hold experts: ZeRO gathers them over other ranks than the layer around them."""
    return [module for layer in layers for name, module in layer.named_modules() if name.endswith("experts")]


def recompute_of(table: RecomputeConfig) -> Recompute:
    """Return what the table asks for, with the names that its modules have within a layer."""
    return Recompute(
        table.mode,
        every=table.every,
        save=tuple(table.save),
        whole=tuple(name for key in table.modules for name in RECOMPUTED_WHOLE.get(key, ())),
        remade=tuple(name for key in table.modules for name in RUN_AGAIN.get(key, ())),
        offload=table.offload,
    )


def plan_of(run_file: RunFile, limits: Limits = USUAL) -> Plan:
    """Return how a rank runs the model, as plain values."""
    return Plan(
        stage=run_file.zero.stage,
        compute_dtype=torch.bfloat16 if run_file.train.precision == "bf16" else None,
        recompute=recompute_of(run_file.recompute),
        compile=run_file.train.compile,
        schedule=("split backward" if stages_of(run_file).splits_backward else "whole backward")
        if run_file.parallel.pp > 1
        else "none",
        limits=limits,
    )


def held_dtype(run_file: RunFile) -> torch.dtype:
    """Return the type of the weights that the optimizer updates."""
    return torch.float64 if run_file.train.precision == "fp64" else torch.float32


def activation_dtype(run_file: RunFile) -> torch.dtype:
    """Return the type of what goes from layer to layer, under autocast too: sums of branches stay wide."""
    return torch.bfloat16 if run_file.train.precision == "bf16" else held_dtype(run_file)


def sizes_of(run_file: RunFile, world_size: int) -> Sizes:
    """Return the sizes of the mesh's axes on so many ranks."""
    parallel = run_file.parallel
    return Sizes(
        pp=parallel.pp,
        dp_replicate=parallel.dp_replicate,
        dp_shard=parallel.dp_shard_in(world_size),
        cp=parallel.cp,
        tp=parallel.tp,
        ep=parallel.ep,
        etp=parallel.etp,
    )


def resolve_device(wanted: str, local_rank: int) -> torch.device:
    """Return the device of this rank.

    Raises:
        ConfigError: if the machine has no such device.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if local_rank >= found:
            way_out = "one rank for each GPU" if found else '"cpu"'
            raise ConfigError(
                "run.device", [f'"cuda": local rank {local_rank} finds {found} GPUs; {way_out} would fit']
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("run.device", ['"mps": this machine has no Apple GPU that torch can use; "cpu" would fit'])
    return torch.device(wanted)


def check_compiler(run_file: RunFile, device: torch.device) -> None:
    """Refuse to compile for a CPU on a machine without a C++ compiler, which torch.compile calls.

    Raises:
        ConfigError: if it is asked for and there is none.
    """
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    if run_file.train.compile and device.type == "cpu" and not any(name and shutil.which(name) for name in names):
        raise ConfigError(
            "train.compile",
            ["true: needs a C++ compiler on a CPU (Debian, Ubuntu: apt-get install g++); false would fit"],
        )


def check_exchange(run_file: RunFile, device: torch.device) -> None:
    """Refuse to exchange tokens by a package that is not here.

    Raises:
        ConfigError: with the reason.
    """
    wanted = run_file.parallel.expert_exchange
    if wanted == "deep_ep" and (reason := why_not_deep_ep(device)):
        raise ConfigError("parallel.expert_exchange", [f'"deep_ep": {reason}; "all_to_all" would fit'])


def with_vocab_of(run_file: RunFile, store: TokenStore) -> RunFile:
    """Return the run file with the vocabulary's size filled in from the store, which it has been held against."""
    return run_file.model_copy(update={"model": run_file.model.with_vocab(store.vocab_size)})


def empty_model(config: ModelConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Return a model of one process whose weights are allocated and not filled."""
    model = build_model(config, device="meta", dtype=dtype)
    model.to_empty(device=device)
    reset_buffers(model)
    return model.eval()
