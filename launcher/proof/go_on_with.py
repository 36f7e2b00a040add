"""What `verify-resume --to "tp=2,dp_shard=1"` means, and why it cannot be; no torch here, so it is told at once."""

from math import lcm

from meshwright.launcher.runfile.cross_checks import check, check_on_any_world
from meshwright.launcher.runfile.messages import ConfigError
from meshwright.launcher.runfile.tables import RunFile
from meshwright.launcher.runfile.would_fit import with_keys
from meshwright.parallel.config import AXES, MAX_RANKS
from meshwright.parallel.fits import divisors, nearest

_MOST_TRIED = 64  # numbers of ranks that are tried for one that would fit


def go_on_with(text: str, run_file: RunFile, world_size: int, *, said_by: str = "the run file") -> tuple[RunFile, int]:
    """Return the run file with the layout of `tp=2,dp_shard=1`, and its ranks; axes not named stay as they are.

    `said_by` is where the number of ranks comes from, for the message.

    Raises:
        ConfigError: naming what is no axis or no size, or why the run file does not fit on that layout.
    """
    given = _given_axes(text)
    changed = with_keys(run_file, "parallel", **given)
    others = changed.parallel.tp * changed.parallel.pp * changed.parallel.cp * changed.parallel.dp_replicate
    ranks = others * changed.parallel.dp_shard or world_size
    if not changed.parallel.dp_shard and changed.parallel.problems(ranks):
        line = _ranks_problem(text, given, run_file, world_size, said_by)
        raise ConfigError(f"--to {text}", [*check_on_any_world(changed), line])
    if problems := check(changed, ranks):
        raise ConfigError(f"--to {text}", problems)
    return changed, ranks


def _given_axes(text: str) -> dict[str, int]:
    problems, given = [], dict[str, int]()
    for item in text.split(","):
        axis, _, size = (part.strip() for part in item.partition("="))
        if axis not in AXES:
            problems.append(f"--to {item.strip()!r}: is no axis=size; the axes are {', '.join(AXES)}")
        elif not (size.isdecimal() and len(size) < 10 and int(size) > 0):
            problems.append(f"--to {item.strip()!r}: the size must be a whole number of at least 1; write tp=2,pp=1")
        elif axis in given:
            problems.append(
                f"--to {item.strip()!r}: {axis} is named before, as {axis}={given[axis]}; name each axis once"
            )
        else:
            given[axis] = int(size)
    if problems:
        raise ConfigError("--to", problems)
    return given


def _ranks_problem(text: str, given: dict[str, int], run_file: RunFile, world_size: int, said_by: str) -> str:
    """Say that the axes do not make up the run's ranks, and which sizes, or which other number of ranks, would do."""
    changed = with_keys(run_file, "parallel", **given)
    table = changed.parallel
    step = lcm(table.tp * table.pp * table.cp * table.dp_replicate, table.pp * table.ep * table.etp)
    ways = []
    for axis in given:
        fits = [
            size
            for size in divisors(world_size)
            if size != given[axis] and not check(with_keys(run_file, "parallel", **{**given, axis: size}), world_size)
        ]
        if fits:
            ways.append(f"{axis} of {nearest(fits, given[axis], 4)}")
    worlds = range(step, min(_MOST_TRIED * step, MAX_RANKS) + 1, step)
    ranks = next((n for n in worlds if not check(run_file, n) and not check(changed, n)), 0)
    if ranks:
        ways.append(f"-n {ranks}")
    return (
        f"--to {text!r}: needs {step} ranks or a multiple; the run has {world_size} (from {said_by}), and --to must"
        f" keep this number unless it names dp_shard; {' or '.join(ways) or 'smaller sizes'} would fit"
    )
