"""How many ranks a run file is meant for, where nobody says, and the run file as it is on them."""

from pathlib import Path

from meshwright.launcher.runfile.read import read_run_file
from meshwright.launcher.runfile.tables import RunFile
from meshwright.parallel.config import ParallelConfig


def usual_world(parallel: ParallelConfig) -> int:
    """Return how many ranks the axes of a run file multiply to; where dp_shard is what remains, the fewest that fit.

    At least two: one process alone has no layout.
    """
    others = parallel.tp * parallel.pp * parallel.cp * parallel.dp_replicate
    if parallel.dp_shard:
        return others * parallel.dp_shard
    fewest = 1 if others > 1 else 2
    stage, experts = others // parallel.pp, parallel.ep * parallel.etp
    return others * next(size for size in range(fewest, fewest + experts + 1) if stage * size % experts == 0)


def read_for_world(run_file: Path, overrides: list[str], world_size: int | None) -> tuple[RunFile, int]:
    """Read a run file for this many ranks, or else for as many as it is meant for; return it with their number.

    Raises:
        ConfigError: if it cannot run on them, with every mistake.
    """
    if world_size:  # once, so that `check` has the same words
        return read_run_file(run_file, overrides, world_size=world_size), world_size
    world = usual_world(read_run_file(run_file, overrides).parallel)  # what no number of ranks would mend is told first
    return read_run_file(run_file, overrides, world_size=world), world
