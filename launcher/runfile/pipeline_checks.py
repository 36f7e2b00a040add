"""What a pipeline asks of the model, the batch and the rest of the layout.

    stages          at most as many as layers
    micro-batches   of one size, because activations of one shape go from stage to stage, and as many as the schedule
                    takes; for every size that train.batch_ramp comes through
    schedules that compute the gradients of weights apart: no ZeRO-3, no layer run again, no torch.compile, no "bf16",
                    no further tokens of a tied embedding

Nothing here loads torch.
"""

from collections.abc import Iterator

from meshwright.launcher.runfile.messages import problem, shown
from meshwright.launcher.runfile.tables import RunFile
from meshwright.launcher.runfile.would_fit import Choose, all_of, with_keys
from meshwright.launcher.stages import stages_of
from meshwright.parallel.config import ZERO_BUBBLE
from meshwright.parallel.fits import nearest, up_to

WHOLE_BACKWARD = '"1f1b", "gpipe" or "interleaved_1f1b"'

# Ranks of a pipeline that are looked at one by one for a message.
_MOST_TRIED = 256


def pipeline_problems(run_file: RunFile, choose: Choose = all_of) -> list[str]:
    """Return every reason why the model cannot go through a pipeline, on any number of ranks."""
    if run_file.parallel.pp == 1:
        return []
    found = [*run_file.pipeline.problems(), *_sharing_problems(run_file)]
    return found or [*_stage_problems(run_file, choose), *_split_backward_problems(run_file)]


def _sharing_problems(run_file: RunFile) -> list[str]:
    """Refuse layers that share weights: their uses would lie on several stages."""
    model, pp = run_file.model, run_file.parallel.pp
    if model.held_layers == model.num_layers:
        return []
    rule = f"would spread the uses of shared weights (model.distinct_layers = {model.distinct_layers}) over stages"
    return [problem("parallel.pp", pp, rule, "1, or model.distinct_layers = 0, would fit")]


def _stage_problems(run_file: RunFile, choose: Choose) -> list[str]:
    pp, layers, stages = run_file.parallel.pp, run_file.model.num_layers, stages_of(run_file)
    if stages.count <= layers:
        return []
    each = f" ({stages.per_rank} on each rank)" if stages.per_rank > 1 else ""
    most = max(1, layers // stages.per_rank)
    allowed = range(1, min(most, _MOST_TRIED) + 1)
    fits = choose("parallel.pp", {size: with_keys(run_file, "parallel", pp=size) for size in allowed})
    way_out = up_to(most) if len(fits) == len(allowed) else f"one of {nearest(fits, pp)}"
    if stages.per_rank > 1 and pp <= layers and run_file.pipeline.stages_per_rank == 0:
        way_out += ', or pipeline.schedule = "1f1b",'
    rule = f"makes {stages.count} stages{each}, and model.num_layers = {layers} gives each at least one layer"
    return [problem("parallel.pp", pp, rule, f"{way_out} would fit")]


def _split_backward_problems(run_file: RunFile) -> list[str]:
    schedule, train = run_file.pipeline.schedule, run_file.train
    if schedule not in ZERO_BUBBLE:
        return []
    recompute, stage = run_file.recompute.mode, run_file.zero.stage
    further_of_one_matrix = run_file.model.tie_embeddings and run_file.model.multi_token is not None
    # torch 2.13: under ZeRO-3 gradients are lost without a word; a layer is recomputed once for each group of weights;
    # what lies between two uses of one weight is gone through twice, and the graph is freed by then.
    rows: list[tuple[str, object, bool, str, str]] = [
        ("zero.stage", stage, stage == 3, "would gather weights for each part of the backward", "0, 1 or 2"),
        (
            "recompute.mode",
            recompute,
            run_file.recompute.runs_parts_again,
            "would recompute a layer many times over",
            '"none", "modules" with "norm" and "activation"',
        ),
        ("train.compile", train.compile, train.compile, "needs whole backwards", "false"),
        (
            "train.precision",
            train.precision,
            train.precision == "bf16",
            "would add up the gradients of micro-batches in bf16",
            '"bf16_autocast"',
        ),
        (
            "model.tie_embeddings",
            True,
            further_of_one_matrix,
            "would use one matrix before and behind the layers of [model.multi_token]",
            "false",
        ),
    ]
    return [
        problem(
            key,
            value,
            f"{rule}, and pipeline.schedule = {shown(schedule)} takes backwards apart",
            f"{fits}, or schedule {WHOLE_BACKWARD}, would fit",
        )
        for key, value, is_refused, rule, fits in rows
        if is_refused
    ]


def micro_batch_problems(run_file: RunFile, world_size: int) -> list[str]:
    """Return each batch size of which a rank's samples are no steps of the schedule."""
    parallel = run_file.parallel
    if parallel.pp == 1 or run_file.pipeline.problems() or not parallel.makes_up(world_size):
        return []
    dp, sizes = parallel.dp_in(world_size), run_file.train.batch_sizes
    return [line for key, size in sizes if size % dp == 0 for line in _of_size(run_file, key, size, dp)]


def sizes_near(run_file: RunFile, size: int, dp: int) -> list[int]:
    """Return the batch sizes next to this one, below and above it, that `dp` ranks share in steps of the schedule."""
    if run_file.parallel.pp == 1 or run_file.pipeline.problems():
        near = size // dp * dp
        return [other for other in (near, near + dp) if other > 0]
    stages, step = stages_of(run_file), run_file.train.micro_batch_size * dp
    most = max(1, round(size / step)) + 4 * stages.count + 1
    fitting = [number * step for number in range(1, most + 1) if stages.takes(number)]
    return [other for other in fitting if other < size][-1:] + [other for other in fitting if other > size][:1]


def _of_size(run_file: RunFile, key: str, size: int, dp: int) -> Iterator[str]:
    stages, at_once, samples = stages_of(run_file), run_file.train.micro_batch_size, size // dp
    count, left = divmod(samples, at_once)
    if left == 0 and stages.takes(count):
        return
    parts = [part for part in range(1, samples + 1) if samples % part == 0 and stages.takes(samples // part)]
    way_out = (
        f"one of {sizes_near(run_file, size, dp)}"
        + (f", or train.micro_batch_size = {parts[-1]}," if parts else "")
        + " would fit"
    )
    if left:
        rule = f"leaves {samples} samples on a rank, which train.micro_batch_size = {at_once} does not divide"
    else:
        rule = f"leaves {count} micro-batch{'es' if count > 1 else ''} of {at_once} on a rank"
    schedule = shown(run_file.pipeline.schedule)
    yield problem(key, size, f"{rule}; pipeline.schedule = {schedule} takes {stages.rule()}, of one size", way_out)
