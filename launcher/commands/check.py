"""`meshwright check`: every mistake in a run file at once, or what the run will be. Loads no torch and no numpy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from meshwright.data.meta import StoreMeta
from meshwright.launcher.runfile.footprint import micro_batch_bytes, state_bytes
from meshwright.launcher.runfile.on_disk import store_of
from meshwright.launcher.runfile.read import read_run_file
from meshwright.launcher.runfile.tables import RunFile
from meshwright.launcher.stages import layers_of_stages, stage_costs, stages_of
from meshwright.launcher.training.batch_ramp import BatchRamp
from meshwright.launcher.training.learning_rate import warmup_length
from meshwright.model.config import ModelConfig
from meshwright.model.counts.costs import active_parameter_count, parameter_count, training_flops_per_token
from meshwright.model.presets import PRESETS
from meshwright.parallel.config import MAX_RANKS
from meshwright.parallel.pipeline.simulate import predict

MOST_SIMULATED = 512


def check(
    run_file: Annotated[Path, typer.Argument(help="The run file, such as runs/moe_tiny.toml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Keys to change, such as train.steps=200 run.name=second."),
    ] = None,
    world_size: Annotated[
        int,
        typer.Option(
            "--world-size", "-n", max=MAX_RANKS, help="Ranks (processes) the run is meant for: one for each GPU."
        ),
    ] = 1,
) -> None:
    """Look at a run file before anything is started.

    Prints every problem with the key, its value, the rule and what would fit, and exits with status 2; or prints what
    the run will be: layout, size of the model, tokens, and the bytes of state on each rank.

    Where the store of [data] is already on this machine, it is looked at too: its files, the length of its splits and
    its vocabulary. What a checkpoint holds is looked at when training starts. Needs no GPU and loads no torch, so any
    layout can be checked anywhere:

    meshwright check runs/llama3_8b.toml --world-size 64 zero.stage=3
    """
    config = read_run_file(run_file, overrides or [], world_size=world_size, folders="if here")
    store = store_of(config)
    if store is not None:
        config = config.model_copy(update={"model": config.model.with_vocab(store.vocab_size)})
    print(f"{run_file}: no problems on {world_size} rank{'s' if world_size > 1 else ''}")
    for name, text in summary(config, store, world_size):
        print(f"  {name:<12}{text}")


def summary(run_file: RunFile, store: StoreMeta | None, world_size: int) -> list[tuple[str, str]]:
    """Return what the run will be, as named lines; the run file must have passed its checks."""
    model, parallel, train = run_file.model, run_file.parallel, run_file.train
    dp = parallel.dp_in(world_size)
    layout = f"dp {dp}" + (f" ({parallel.dp_replicate} copies)" if parallel.dp_replicate > 1 else "")
    layout += "".join(
        f", {name} {getattr(parallel, name)}" for name in ("tp", "pp", "cp") if getattr(parallel, name) > 1
    )
    layout += f" ({parallel.context})" if parallel.cp > 1 else ""
    if model.moe:
        layout += f", ep {parallel.ep} x edp {parallel.edp_in(world_size)}"
        layout += f" x etp {parallel.etp}" if parallel.etp > 1 else ""
    batches = BatchRamp.of(train)
    per_rank = train.global_batch_size // dp
    at_once = min(per_rank, train.micro_batch_size)
    accumulated = -(-per_rank // at_once)
    tokens = batches.samples_after(train.steps) * run_file.data.seq_len
    state = state_bytes(run_file, world_size)
    flops = training_flops_per_token(model, run_file.data.seq_len)
    return [
        ("run", f"{run_file.run.name} -> {run_file.run.output_folder}, seed {run_file.run.seed}"),
        ("layout", f"{layout}, ZeRO-{run_file.zero.stage}, {_recompute_words(run_file)}, {train.precision}"),
        *_exchange_lines(run_file),
        *_pipeline_lines(run_file, accumulated),
        ("model", _model_line(run_file)),
        ("", f"{flops / 1e9:.3g} GFLOP for each token trained on (attention counted causal)"),
        *([("preset", _preset_line(model))] if model.preset else []),
        ("data", _data_line(run_file, store)),
        (
            "step",
            f"{train.global_batch_size} samples x {run_file.data.seq_len} ="
            f" {train.global_batch_size * run_file.data.seq_len:,} tokens; on each rank {accumulated} micro-"
            f"batch{'es' if accumulated > 1 else ''} of {'' if per_rank % at_once == 0 else 'at most '}{at_once}"
            + (f", after a ramp over {list(batches.sizes[:-1])}" if train.batch_ramp else ""),
        ),
        (
            "length",
            f"{train.steps:,} steps, {tokens:,} tokens in all,"
            f" {tokens / active_parameter_count(model):.3g} for each active weight",
        ),
        ("schedule", _schedule_line(run_file)),
        (
            "state",
            f"{_size(state.total)} on each rank: weights {_size(state.weights)}, masters {_size(state.masters)},"
            f" gradients {_size(state.gradients)}, moments {_size(state.moments)}",
        ),
        ("", _activations_line(run_file, world_size)),
    ]


def _exchange_lines(run_file: RunFile) -> list[tuple[str, str]]:
    """Say what the ranks' machine must have for the exchange of tokens, which may be another than this one."""
    if run_file.parallel.expert_exchange == "all_to_all":
        return []
    return [("exchange", "DeepEP, which the ranks' machine must have: the package deep_ep and NVIDIA Hopper GPUs")]


def _pipeline_lines(run_file: RunFile, micro_batches: int) -> list[tuple[str, str]]:
    """Say which layers each stage has, and what the schedule is predicted to cost."""
    if run_file.parallel.pp == 1:
        return []
    stages, cut, costs = stages_of(run_file), layers_of_stages(run_file), stage_costs(run_file)
    # The middle of a step repeats itself: more micro-batches than these only take longer to simulate.
    simulated = next(n for n in range(min(micro_batches, MOST_SIMULATED), 0, -1) if stages.takes(n) or n == 1)
    predicted = predict(stages, simulated, costs)
    of_all = f"{micro_batches}" if simulated == micro_batches else f"{simulated:,} of the {micro_batches:,}"
    held = [
        " and ".join(_layers_text(cut[stage]) for stage in stages.held_by(rank)) for rank in range(stages.num_ranks)
    ]
    text = f"{stages.schedule}, {stages.count} stages; layers by rank: {', '.join(held)}"
    unsure = "" if run_file.model.vocab_size else "; without the output, whose size is the tokenizer's"
    return [
        ("pipeline", text + unsure),
        (
            "",
            f"predicted with {of_all} micro-batches: the ranks wait {predicted.bubble:.1%} of the time and hold"
            f" the activations of at most {list(predicted.in_flight)} stages' micro-batches at once",
        ),
    ]


def _layers_text(layers: range) -> str:
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else f"{layers[0]}"


def _recompute_words(run_file: RunFile) -> str:
    table = run_file.recompute
    modules = f" ({', '.join(table.modules)})" if table.mode == "modules" else ""
    return f"recompute {table.mode}{modules}" + (", offload" if table.offload else "")


def _activations_line(run_file: RunFile, world_size: int) -> str:
    """Say what comes on top of the state."""
    found = micro_batch_bytes(run_file, world_size)
    table = run_file.recompute
    bound = "" if table.mode in ("none", "full") and not table.offload else "at most "
    text = f"activations on top: {bound}{_size(found.kept)} for each micro-batch until its backward"
    return text + f", {_size(found.at_work)} while a layer or the loss is at work"


def _model_line(run_file: RunFile) -> str:
    model = run_file.model
    total, active = parameter_count(model), active_parameter_count(model)
    text = f'{model.num_layers} layers "{model.pattern}", hidden {model.hidden_size}, {_count(total)} weights'
    if active != total:
        text += f", {_count(active)} active"
    return text + ("" if model.vocab_size else " (without the embedding: vocab_size is the tokenizer's)")


def _preset_line(model: ModelConfig) -> str:
    """Say which keys of the preset the run file has otherwise: those beside it win, wherever it was named."""
    beneath = PRESETS[model.preset]
    other = [key for key, value in beneath.items() if not isinstance(value, Mapping) and getattr(model, key) != value]
    for table, keys in beneath.items():
        if isinstance(keys, Mapping):
            own = getattr(model, table)
            other += [f"{table}.{key}" for key, value in keys.items() if own is None or getattr(own, key) != value]
    return f"{model.preset}" + (f", but for {', '.join(other)}" if other else "")


def _data_line(run_file: RunFile, store: StoreMeta | None) -> str:
    where = f"{run_file.data.store}, samples of {run_file.data.seq_len} tokens"
    if store is None:
        return f"{where}; the store is not here yet (`meshwright prepare` writes it)"
    splits = ", ".join(f"{name} {split.num_tokens:,} tokens" for name, split in store.splits.items())
    return f"{where}; {splits}; vocabulary {store.vocab_size:,}"


def _schedule_line(run_file: RunFile) -> str:
    table = run_file.learning_rate
    warmup = warmup_length(run_file.train.steps, table)
    return f"{table.schedule}, peak {table.peak:g} after {warmup} steps, end {table.peak * table.final_fraction:g}"


def _count(number: int) -> str:
    """Return a count of weights as people say it, with the exact one."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit} ({number:,})"
    return str(number)


def _size(number: float) -> str:
    """Return bytes in the unit that leaves a small number."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} B"
