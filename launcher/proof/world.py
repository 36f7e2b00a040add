"""How many ranks a run file is meant for, where nobody says."""

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
