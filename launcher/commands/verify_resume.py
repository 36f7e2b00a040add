"""`meshwright verify-resume`: does a run that is killed and goes on with another layout come to the same?"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from meshwright.parallel.config import MAX_RANKS


def verify_resume(
    run_file: Annotated[Path, typer.Argument(help="The run file, such as runs/moe_tiny.toml.")],
    to: Annotated[str, typer.Option(metavar="AXIS=SIZE,...", help='The layout to go on with: "tp=2,dp_shard=1".')],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys to change, such as zero.stage=3.")
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
    steps: Annotated[int, typer.Option(min=1, max=100, help="Steps before the kill, and again after it.")] = 3,
    out: Annotated[
        Path | None, typer.Option(help="The JSON file to write; default: verify_resume.json in the run's folder.")
    ] = None,
) -> None:
    """Verify that this run can be killed, go on with another layout, and be the run that was never stopped.

    Trains the narrowed model (as prove does) on the run file's layout, on at most 8 CPU ranks: twice as many steps at a
    stretch, and again with every rank killed after the checkpoint in the middle. What goes on from there, on the layout
    of --to, must see the same token ids, have the same learning rates, and come to the same losses, weights and
    moments, in fp64 to 1e-9. On the same layout, in the run file's own precision, all of it must be equal bit for bit.

    Axes that --to does not name stay as the run file has them. Exit status: 0 the same, 1 different or no answer,
    2 a mistake in what was given.

    meshwright verify-resume runs/moe_tiny.toml --to "tp=2,dp_shard=1"
    """
    from meshwright.launcher.proof.answer import answer_place, leave, stoppable, tell, undisturbed, with_mistakes_of
    from meshwright.launcher.proof.go_on_with import go_on_with
    from meshwright.launcher.proof.world import read_for_world

    with with_mistakes_of(out, "verify_resume.json"):
        config, world = read_for_world(run_file, overrides or [], world_size)
        changed = go_on_with(to, config, world, said_by="-n" if world_size else "the run file")
    path = answer_place(out, config.run.output_folder, "verify_resume.json", source=str(run_file))

    with stoppable("verify-resume", "nothing was verified", path):
        from meshwright.launcher.proof import resume, resume_report
        from meshwright.launcher.proof.report import write_json

        plan = resume.plan_resume(config, world, changed, steps)
        tell(*resume_report.heading(str(run_file), plan))
        results = resume.verify_resume(plan, lambda result: tell(*resume_report.row(result)))
    is_same = all(result.is_same for result in results)
    with undisturbed():
        tell(*resume_report.ending(results))
        leave(path, lambda: write_json(path, resume_report.as_json(str(run_file), plan, results)), is_same=is_same)
    if not is_same:
        sys.exit(1)
