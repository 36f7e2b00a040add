"""One rank's whole life: check the run file, meet the others, build, resume, train, sum up.

Everything that can be wrong with what a user gave is looked for before the ranks meet, and again where it needs
the checkpoint; then it is raised on every rank alike, so that none waits for another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from meshwright.data.meta import TOKENIZER_NAME
from meshwright.data.store import TokenStore
from meshwright.kernels.choose import use
from meshwright.launcher.build import (
    Run,
    build_run,
    check_compiler,
    check_exchange,
    held_dtype,
    resolve_device,
    sizes_of,
    with_vocab_of,
)
from meshwright.launcher.kernel_choices import attention_lines, choices_of_run, grouped_lines
from meshwright.launcher.memory_limit import check_memory
from meshwright.launcher.observe.metrics import Meter
from meshwright.launcher.observe.peak import choose_peak
from meshwright.launcher.observe.provenance import write_provenance
from meshwright.launcher.observe.sinks import Sinks, open_sinks
from meshwright.launcher.observe.summary import RunFacts, print_summary, write_summary
from meshwright.launcher.observe.terminal import StderrConsole, while_it_is_read
from meshwright.launcher.ranks.environment import RankInfo, threads_of
from meshwright.launcher.ranks.rendezvous import process_group
from meshwright.launcher.runfile.read import read_run_file
from meshwright.launcher.runfile.write import write_resolved
from meshwright.launcher.training.loop import held_out_lines, train
from meshwright.launcher.training.run_lock import run_lock
from meshwright.launcher.training.saving import Saver, resume
from meshwright.launcher.training.stopping import Signals
from meshwright.model.counts.costs import training_flops_per_token
from meshwright.parallel.mesh import build_mesh


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    run_file: Path
    overrides: Sequence[str]
    allow_change: Sequence[str]


def run_rank(request: Request, info: RankInfo) -> None:
    """Train as one rank of the run.

    Raises:
        ConfigError: if what the user gave cannot be honoured.
    """
    run_file = read_run_file(request.run_file, request.overrides, world_size=info.world_size, folders="needed")
    store = TokenStore.open(run_file.data.store)
    run_file = with_vocab_of(run_file, store)
    device = resolve_device(run_file.run.device, info.local_rank)
    check_compiler(run_file, device)
    check_exchange(run_file, device)
    check_memory(run_file, device, info.world_size, info.local_world_size)
    threads = threads_of(info, run_file.train.threads)
    torch.set_num_threads(threads)
    signals = Signals()
    with process_group(info, device, run_file.run.timeout_seconds):
        mesh = build_mesh(sizes_of(run_file, info.world_size), timedelta(seconds=run_file.run.timeout_seconds))
        run = build_run(run_file, store, mesh, device)
        train_on(run, signals, request.allow_change, about=[_about(info, device, threads)])


def train_on(run: Run, signals: Signals, allow_change: Sequence[str] = (), about: Sequence[str] = ()) -> None:
    """Bring a built run to its checkpoint, train it to its end, and sum it up; every rank calls this.

    Raises:
        ConfigError: if the checkpoint does not fit the run.
        NotANumberError: if training came to a loss that is no number.
    """
    with run_lock(run.folder, run.mesh) as told:
        _train_locked(run, signals, allow_change, [*about, *told])


def _train_locked(run: Run, signals: Signals, allow_change: Sequence[str], about: Sequence[str]) -> None:
    began = resume(run, allow_change)
    chosen = choices_of_run(began.progress.kernels, run.mesh, run.device, held_dtype(run.run_file))
    use(chosen.choices)
    began.progress.kernels = chosen.choices.to_dict()
    is_first_rank, table, dtype = run.mesh.rank == 0, run.run_file, _product_dtype(run)
    slow = attention_lines(table, run.device, dtype)
    slow += grouped_lines(table.model, table.parallel.etp, run.device, dtype)
    with open_sinks(
        run.folder,
        rank=run.mesh.rank,
        total_steps=table.train.steps,
        resumed_at=began.progress.step,
        every=table.log.every,
        unit="gpu" if run.device.type == "cuda" else "rank",
    ) as sinks:
        for event in [*about, *chosen.reasons, *slow, *held_out_lines(run), *began.events]:
            sinks.event(event)
        if began.progress.step >= table.train.steps:
            sinks.event(f"all {table.train.steps} steps are made; a larger train.steps goes on from here")
        versions = write_what_runs(run, sinks) if is_first_rank else {}
        saver = Saver(run, began)
        newest = train(run, began.progress, saver, sinks, meter_of(run), signals)
    if is_first_rank:
        sum_up(run, versions, newest)


def meter_of(run: Run) -> Meter:
    """Return what turns a step's raw numbers into named ones."""
    flops = training_flops_per_token(run.run_file.model, run.run_file.data.seq_len)
    return Meter(run.mesh.world.size, flops, choose_peak(run.device, _product_dtype(run)))


def _product_dtype(run: Run) -> torch.dtype:
    """Return the type that products are computed in."""
    return {"fp32": torch.float32, "fp64": torch.float64}.get(run.run_file.train.precision, torch.bfloat16)


def write_what_runs(run: Run, sinks: Sinks) -> dict[str, str]:
    """Write run.toml, provenance.json and the tokenizer into the run's folder; return the versions."""
    (run.folder / "run.toml").write_text(write_resolved(run.run_file), encoding="utf-8")
    tokenizer = (run.store.path / TOKENIZER_NAME).read_bytes()
    (run.folder / TOKENIZER_NAME).write_bytes(tokenizer)
    start, problem = write_provenance(run.folder, run.device)
    if problem:
        sinks.event(problem)
    return dict(start.get("versions") or {})


def sum_up(run: Run, versions: dict[str, str], newest: Path | None) -> None:
    """Write the summary with its picture, and print it."""
    facts = RunFacts(
        name=run.run_file.run.name,
        unigram_entropy=run.store.meta.validation_unigram_nats,
        checkpoint=str(newest) if newest else None,
        versions=versions,
    )
    summary: dict[str, Any] = write_summary(run.folder, facts)
    with while_it_is_read():
        print_summary(summary, StderrConsole())


def _about(info: RankInfo, device: torch.device, threads: int) -> str:
    """Say on what the run runs, in words."""
    about = f"{info.world_size} rank{'s' if info.world_size > 1 else ''} ({info.how}) on {device.type}"
    return about + (f", {threads} thread{'s' if threads > 1 else ''} each" if device.type == "cpu" else "")
