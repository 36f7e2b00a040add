"""`meshwright prove`: does this run file's layout compute what one process computes? Asked on a few CPU ranks."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from meshwright.launcher.runfile.messages import ConfigError, problem
from meshwright.parallel.config import MAX_RANKS, ParallelConfig


def prove(
    run_file: Annotated[Path, typer.Argument(help="The run file, such as runs/moe_tiny.toml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Keys to change, such as zero.stage=3 parallel.ep=4."),
    ] = None,
    world_size: Annotated[
        int,
        typer.Option(
            "--world-size",
            "-n",
            min=0,
            max=MAX_RANKS,
            help="Ranks the run is meant for; 0 = what the axes of [parallel] multiply to.",
        ),
    ] = 0,
    out: Annotated[
        Path | None, typer.Option(help="The JSON file to write; default: proof.json in the run's folder.")
    ] = None,
) -> None:
    """Prove that this run file's layout computes what one process computes, before a GPU is paid for.

    Takes the run file's model, narrowed in width and layers with every feature kept, and its layout, shrunk to at most
    8 CPU ranks in which every three axes stand together, trains a few steps, and compares with one process: tokens,
    outputs of the layers, experts, loss, every gradient, the norm that clips, every updated weight, and the weights
    through a checkpoint; in fp64, in fp32, and in the run file's own precision.

    Prints each key that was changed and a line for each layout. On a difference: the first tensor and step, by how
    much, and the axis, found by running again with one axis off at a time. Exit status: 0 the same, 1 different or no
    answer, 2 a mistake in what was given. Needs no GPU and no store.

    meshwright prove runs/moe_tiny.toml

    meshwright prove runs/qwen3_30b_a3b.toml -n 64 zero.stage=2
    """
    from meshwright.launcher.proof.answer import answer_place, leave, stoppable, tell, undisturbed, with_mistakes_of
    from meshwright.launcher.proof.world import read_for_world

    with with_mistakes_of(out, "proof.json"):
        config, world = read_for_world(run_file, overrides or [], world_size)
    if world == 1:
        raise ConfigError(str(run_file), [_of_one_process(config.parallel)])
    path = answer_place(out, config.run.output_folder, "proof.json", source=str(run_file))

    with stoppable("prove", "nothing was proved", path):
        from meshwright.launcher.proof import prove as proof
        from meshwright.launcher.proof import report

        plan = proof.plan_proof(config, world)
        tell(*report.heading(str(run_file), plan))
        done = proof.prove(plan, lambda result: tell(*report.row(plan, result)))
    with undisturbed():
        tell(*report.ending(done))
        leave(path, lambda: report.write_json(path, report.as_json(str(run_file), done)), is_same=done.is_same)
    if not done.is_same:
        sys.exit(1)


def _of_one_process(parallel: ParallelConfig) -> str:
    """Return what is wrong with a world of one rank, by the key that made it so."""
    if parallel.dp_shard == 0:
        return problem("-n", 1, "one process has no layout to prove", "-n 2 would fit")
    rule = "with every other axis at 1 this is one process, which has no layout to prove"
    return problem("parallel.dp_shard", parallel.dp_shard, rule, "parallel.dp_shard=2 would fit")
