"""What needs several tables to be seen: model against layout, batch against ranks, device against all.

`check` returns every such problem, each with the key as written, its value, the rule and what would fit. What is
wrong with one value alone is found when its table is made; what needs only one table stands with that table
(`ModelConfig.problems`, `ParallelConfig.problems`). Nothing here loads torch: it is checked before a rank is started.
"""

from collections.abc import Mapping

from meshwright.launcher.runfile.layout_checks import layout_problems, lengths_that_fit
from meshwright.launcher.runfile.messages import problem
from meshwright.launcher.runfile.optimizer_rules import optimizer_problems
from meshwright.launcher.runfile.pipeline_checks import micro_batch_problems, pipeline_problems, sizes_near
from meshwright.launcher.runfile.recompute_checks import recompute_problems
from meshwright.launcher.runfile.tables import RunFile
from meshwright.launcher.runfile.would_fit import Choose, all_of, chooser, keys_of
from meshwright.launcher.training.learning_rate import learning_rate_problems
from meshwright.model.config import ModelConfig
from meshwright.model.counts.shapes import parameter_shapes
from meshwright.model.kinds.sizes import MAX_LAYERS, round_up
from meshwright.model.pattern import kinds_in, parse_pattern, parse_placed
from meshwright.parallel.config import ParallelConfig
from meshwright.parallel.fits import up_to

# File systems take 255 bytes; what remains is for endings.
LONGEST_NAME = 200


def check(run_file: RunFile, world_size: int) -> list[str]:
    """Return every reason why this run cannot start on `world_size` ranks; empty means that it can."""
    if world_size < 1:
        found = check_on_any_world(run_file)
        world = run_file.parallel.smallest_world()
        return [problem("world size", world_size, "must be at least 1", f"{world} would fit" if world else ""), *found]
    found = _problems(run_file, _chooser(run_file, world_size))
    found += [line for line in _world_problems(run_file, world_size) if line not in found]
    found += _batch_problems(run_file, world_size)
    found += micro_batch_problems(run_file, world_size)
    if run_file.run.device == "mps" and world_size > 1:
        found.append(
            problem("run.device", "mps", f"is for one process, and the world size is {world_size}", "1 would fit")
        )
    return found


def check_on_any_world(run_file: RunFile) -> list[str]:
    """Return every problem that no number of ranks would mend."""
    return _problems(run_file, _chooser(run_file, None))


def _problems(run_file: RunFile, choose: Choose) -> list[str]:
    return [
        *_name_problems(run_file),
        *_position_problems(run_file),
        *_size_problems(run_file, choose),
        *_ramp_problems(run_file),
        *_spike_problems(run_file),
        *_learning_rate_problems(run_file),
        *_optimizer_problems(run_file),
        *untrainable(run_file),
        *_saving_problems(run_file),
        *_compile_problems(run_file),
        *_mps_problems(run_file),
    ]


def _size_problems(run_file: RunFile, choose: Choose = all_of) -> list[str]:
    """Return what is wrong with the sizes of the model, of the axes and of what hangs on them."""

    def choose_model(key: str, others: Mapping[int, ModelConfig]) -> list[int]:
        return choose(key, {size: run_file.model_copy(update={"model": other}) for size, other in others.items()})

    return [
        *run_file.model.problems(choose_model),
        *layout_problems(run_file, choose),
        *pipeline_problems(run_file, choose),
        *recompute_problems(run_file),
    ]


def _chooser(run_file: RunFile, world_size: int | None) -> Choose:
    """Return how the sizes that a message names are chosen: with them the sizes of the whole file must go."""
    if world_size is None:
        return chooser(run_file, _size_problems)

    def problems_with(other: RunFile) -> list[str]:
        # A dp_shard that was given must change with any other axis; which one would fit is told when it does not.
        what_remains = other.parallel.model_copy(update={"dp_shard": 0})
        return [*_size_problems(other), *what_remains.problems(world_size)]

    return chooser(run_file, problems_with)


def _world_problems(run_file: RunFile, world_size: int) -> list[str]:
    """Hold [parallel] against the world; a size is said to fit if the model, too, takes it."""

    def problems_with(parallel: ParallelConfig) -> set[str]:
        other = run_file.model_copy(update={"parallel": parallel})
        return {*layout_problems(other), *pipeline_problems(other)}

    def suits(parallel: ParallelConfig) -> bool:
        if parallel is run_file.parallel:  # as they are, the axes must go with the model themselves
            return not any(key.startswith("parallel.") for line in known for key in keys_of(line))
        return problems_with(parallel) <= known

    known = problems_with(run_file.parallel)
    return run_file.parallel.problems(world_size, suits)


def _name_problems(run_file: RunFile) -> list[str]:
    """Refuse a name that no file system takes, once it has endings of our own."""
    name = run_file.run.name
    size = len(name.encode())
    if size <= LONGEST_NAME:
        return []
    return [problem("run.name", name, f"has {size} bytes", f"at most {LONGEST_NAME} would fit")]


def _compile_problems(run_file: RunFile) -> list[str]:
    """Refuse a compiled layer that is recomputed: the second pass may be compiled to other saved tensors."""
    mode, found = run_file.recompute.mode, []
    if run_file.train.compile and mode != "none":
        rule = f'is not possible with recompute.mode = "{mode}" in this version'
        found.append(problem("train.compile", True, rule, 'false, or mode "none", would fit'))
    if run_file.train.compile and run_file.recompute.offload:
        rule = "is not possible with recompute.offload in this version"
        found.append(problem("train.compile", True, rule, "false, or recompute.offload = false, would fit"))
    return found


def _batch_problems(run_file: RunFile, world_size: int) -> list[str]:
    """Return each batch size that the data-parallel ranks cannot share out evenly."""
    if not run_file.parallel.makes_up(world_size):
        return []  # how many ranks share the data is known once the axes go with the world
    dp, found = run_file.parallel.dp_in(world_size), list[str]()
    for key, size in run_file.train.batch_sizes:
        if size % dp != 0:
            fits = sizes_near(run_file, size, dp)
            found.append(
                problem(key, size, f"must be a multiple of the {dp} data-parallel ranks", f"one of {fits} would fit")
            )
    return found


def _position_problems(run_file: RunFile) -> list[str]:
    """Refuse samples that are longer than the learned positions, or too short for the further tokens."""
    rows, seq_len, further = run_file.model.max_positions, run_file.data.seq_len, run_file.model.further_tokens
    found = []
    if run_file.model.position == "learned" and rows and seq_len > rows:
        rule = f"must not exceed model.max_positions = {rows}, the positions that have a learned row"
        found.append(problem("data.seq_len", seq_len, rule, lengths_that_fit(run_file)))
    if further >= seq_len:
        rule = f"must be below data.seq_len = {seq_len}, as no token of a sample has one so far behind it"
        way_out = f"{up_to(seq_len - 1)} would fit" if seq_len > 1 else "leave the table out"
        found.append(problem("model.multi_token.depth", further, rule, way_out))
    return found


def _ramp_problems(run_file: RunFile) -> list[str]:
    found = []
    before = 0
    for at, entry in enumerate(run_file.train.batch_ramp):
        if entry.samples <= before:
            rule = f"must be above the {before} of the entry before it"
            found.append(problem(f"train.batch_ramp[{at}].samples", entry.samples, rule, "sort the list"))
        before = max(before, entry.samples)
    return found


def _spike_problems(run_file: RunFile) -> list[str]:
    """Refuse a multiple of the median below 1: at least every other step would be a spike."""
    multiple = run_file.train.skip_norm_spike
    if multiple == 0.0 or multiple >= 1.0:
        return []
    rule = "must be 0 or at least 1, or most steps would be skipped: half of them are above their median"
    return [problem("train.skip_norm_spike", multiple, rule, "0 (off), or 5 to 20, would fit")]


def _learning_rate_problems(run_file: RunFile) -> list[str]:
    table, steps = run_file.learning_rate, run_file.train.steps
    if table.warmup_steps and table.warmup_fraction:
        rule = f"must not stand beside learning_rate.warmup_fraction = {table.warmup_fraction}"
        return [problem("learning_rate.warmup_steps", table.warmup_steps, rule, "leave one of them out")]
    return learning_rate_problems(steps, table)


def _optimizer_problems(run_file: RunFile) -> list[str]:
    """Hold [optimizer] against the model's parameters, if its layers are known; their sizes do not matter."""
    model = run_file.model
    if not kinds_in(model.pattern) or model.known_kinds != model.part_kinds:
        return []
    # As many as the period and the places ask for; that there are others is the pattern's problem.
    asked = max([model.num_layers, *(place + 1 for place in parse_placed(model.pattern))])
    num_layers = round_up(asked, len(parse_pattern(model.pattern)))
    if num_layers > MAX_LAYERS:
        return []
    whole = model.model_copy(update={"num_layers": num_layers})
    return optimizer_problems(parameter_shapes(whole), run_file.optimizer)


def untrainable(run_file: RunFile) -> list[str]:
    """Return why a model that can be computed, and so be imported, would not be trained as it is meant."""
    moe = run_file.model.moe
    if moe is None or not run_file.model.has("moe") or moe.top_k > 1 or moe.num_experts == 1 or not moe.normalise_top_k:
        return []
    rule = (
        "with model.moe.normalise_top_k = true a token's one weight is always 1, whatever its score, and the router"
        " learns nothing from the loss"
    )
    if run_file.init.upcycle != "none":  # there weights must sum to 1
        return [problem("model.moe.top_k", moe.top_k, rule, "2 or more would fit")]
    return [problem("model.moe.top_k", moe.top_k, rule, "2 or more, or model.moe.normalise_top_k = false, would fit")]


def _saving_problems(run_file: RunFile) -> list[str]:
    every, keep_every = run_file.checkpoint.every, run_file.checkpoint.keep_every
    found = []
    if keep_every and not every:
        rule = "needs checkpoint.every, which is 0"
        found.append(problem("checkpoint.keep_every", keep_every, rule, f"checkpoint.every = {keep_every} would fit"))
    elif keep_every and keep_every % every != 0:
        fits = [near for near in (keep_every // every * every, keep_every // every * every + every) if near > 0]
        rule = f"must be a multiple of checkpoint.every = {every}"
        found.append(problem("checkpoint.keep_every", keep_every, rule, f"one of {fits} would fit"))
    if run_file.init.load == "weights+optimizer" and not run_file.init.source:
        rule = "needs a checkpoint to load, and init.from is empty"
        found.append(problem("init.load", run_file.init.load, rule, "name a folder in init.from, or leave it out"))
    return found


def _mps_problems(run_file: RunFile) -> list[str]:
    """Return what Apple's device lacks, by name; the run would otherwise fail in its first step."""
    if run_file.run.device != "mps":
        return []
    train, one = run_file.train, "there is one process, and nothing to split"
    offload = run_file.recompute.offload
    rows = [
        ("train.precision", train.precision, train.precision == "fp64", "there are no 64-bit numbers", '"fp32"'),
        ("train.precision", train.precision, train.precision == "bf16", "no fp32 masters", '"bf16_autocast" or "fp32"'),
        ("train.compile", train.compile, train.compile, "torch.compile is not offered", "false"),
        ("zero.stage", run_file.zero.stage, run_file.zero.stage > 0, one, "0"),
        ("parallel.ep", run_file.parallel.ep, run_file.parallel.ep > 1, one, "1"),
        ("parallel.pp", run_file.parallel.pp, run_file.parallel.pp > 1, one, "1"),
        ("recompute.offload", offload, offload, "all memory is the host's", "false"),
    ]
    return [
        problem(key, value, f'on run.device = "mps" {rule}', f"{fits} would fit")
        for key, value, is_refused, rule, fits in rows
        if is_refused
    ]
