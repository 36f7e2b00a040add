"""`meshwright train`: train, or go on from the newest checkpoint; alone, with local ranks, or among ranks it finds."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    run_file: Annotated[Path, typer.Argument(help="The run file, such as runs/moe_tiny.toml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Keys to change, such as train.steps=200 run.name=second."),
    ] = None,
    ranks: Annotated[
        int,
        typer.Option(
            min=0, max=1024, help="Start this many ranks on this machine: one for each GPU, 1 to 4 on a laptop's CPU."
        ),
    ] = 0,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="On resume: a key of the run file that may differ from the checkpoint's."),
    ] = None,
) -> None:
    """Train as the run file says; if the run has a checkpoint, go on from the newest one that verifies.

    By itself the command is one process, and with --ranks it starts several here. Under torchrun, srun or mpirun it
    takes its place among the ranks that it finds, and --ranks is not needed. The same run file serves everywhere.

    SIGTERM and SIGUSR1 write a checkpoint and end the run cleanly, SIGUSR2 writes one and goes on. On resume layout,
    logging, saving and the number of steps may change; model, tokenizer, seed and data order may not; anything else
    needs --allow-change KEY and is recorded.

    meshwright train runs/moe_tiny.toml --ranks 2

    meshwright train runs/moe_tiny.toml --ranks 2 learning_rate.peak=1e-3 --allow-change learning_rate.peak

    torchrun --nproc-per-node 8 -m meshwright.launcher train runs/llama3_8b.toml
    """
    from meshwright.launcher.here import problems_here
    from meshwright.launcher.ranks.environment import who_am_i
    from meshwright.launcher.ranks.local_ranks import become_a_rank
    from meshwright.launcher.runfile.messages import ConfigError
    from meshwright.launcher.runfile.read import read_run_file

    # Before any rank is started, and before torch is loaded: every mistake in the run file and the store.
    config = read_run_file(run_file, overrides or [], world_size=max(ranks, who_am_i().world_size), folders="needed")
    if problems := problems_here(config):
        raise ConfigError(str(run_file), problems)
    info = become_a_rank(ranks, config.train.threads)

    from meshwright.launcher.training.start import Request, run_rank

    run_rank(Request(run_file, overrides or [], allow_change or []), info)
