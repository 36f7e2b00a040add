"""What the axes of [parallel] ask of the model and the samples: which sizes must divide, and which sizes would.

    tp, ep, etp   what each kind of part says (`needs` in model/kinds/): num_heads, num_experts, inner widths
    cp            parts that cannot be spread over it refuse it, by name; with Ulysses cp * tp the heads
    cp, tp        the tokens of a sample

A vocabulary need not divide: it is padded. Nothing here loads torch.
"""

from math import lcm

from meshwright.launcher.runfile.messages import problem
from meshwright.launcher.runfile.tables import RunFile
from meshwright.launcher.runfile.would_fit import Choose, all_of, with_keys
from meshwright.model.kinds.multi_token import multi_token_needs
from meshwright.model.kinds.sizes import MAX_SIZE, round_up
from meshwright.parallel.fits import divisors, nearest, up_to


def layout_problems(run_file: RunFile, choose: Choose = all_of) -> list[str]:
    """Return every size of the model and of the samples that the axes do not divide.

    What is wrong with the model in itself stands beside it; only a pattern that is none leaves nothing to look at.
    """
    return [
        *_need_problems(run_file, choose),
        *_refusals(run_file),
        *_token_problems(run_file),
        *_context_problems(run_file, choose),
        *_exchange_problems(run_file),
        *_expert_problems(run_file),
    ]


def _need_problems(run_file: RunFile, choose: Choose) -> list[str]:
    """Return each axis that a size of some part does not divide by, once for each part."""
    parallel, model, found = run_file.parallel, run_file.model, list[str]()
    for needed in [*(kind.needs(model) for kind in model.known_kinds), multi_token_needs(model)]:
        needs = [need._replace(axis="tp") if need.axis == "heads" else need for need in needed]
        for axis in ("tp", "ep", "etp"):
            of_axis = [need for need in needs if need.axis == axis]
            broken = next((need for need in of_axis if not need.allows(getattr(parallel, axis))), None)
            if broken is None:
                continue
            most = lcm(*(need.size for need in of_axis if not need.or_multiple))
            allowed = [ranks for ranks in divisors(most) if all(need.allows(ranks) for need in of_axis)]
            line = _axis_problem(run_file, axis, broken.rule, allowed, choose)
            if line not in found:
                found.append(line)
    return found


def _refusals(run_file: RunFile) -> list[str]:
    """Return each axis over which a part of the pattern cannot be spread."""
    return [
        problem(f"parallel.{axis}", getattr(run_file.parallel, axis), f"{kind.words} {reason}", "1 would fit")
        for kind in run_file.model.part_kinds
        for axis, reason in kind.refuses.items()
        if getattr(run_file.parallel, axis) > 1
    ]


def _axis_problem(run_file: RunFile, axis: str, rule: str, allowed: list[int], choose: Choose) -> str:
    """Return the line for an axis with which a size of the model does not go; `allowed` are those that do."""
    key, size = f"parallel.{axis}", getattr(run_file.parallel, axis)
    fits = choose(key, {other: with_keys(run_file, "parallel", **{axis: other}) for other in allowed})
    return problem(key, size, rule, f"one of {nearest(fits, size)} would fit")


def _token_problems(run_file: RunFile) -> list[str]:
    """Refuse samples whose tokens cannot be cut evenly between layers."""
    cp, tp, seq_len, step = run_file.parallel.cp, run_file.parallel.tp, run_file.data.seq_len, _token_step(run_file)
    rule = f"parallel.tp = {tp}, whose ranks share its tokens between layers"
    if cp > 1:
        rule = f"{step}: each rank of cp = {cp} holds two chunks of it, each rank of tp = {tp} a stretch of these"
    if seq_len % step == 0:
        return []
    return [problem("data.seq_len", seq_len, f"must be a multiple of {rule}", lengths_that_fit(run_file))]


def lengths_that_fit(run_file: RunFile) -> str:
    """Return the lengths of samples next to the one given that the axes, the positions and further tokens take."""
    model, seq_len, step = run_file.model, run_file.data.seq_len, _token_step(run_file)
    least = round_up(model.further_tokens + 1, step)
    most = model.max_positions // step * step if model.position == "learned" and model.max_positions else MAX_SIZE
    if most < least:
        return f"{least} would fit, with model.max_positions = {least}"
    if seq_len > most and step == least == 1:
        return f"{up_to(most)} would fit"
    below = min(seq_len // step * step, most)
    fits = sorted({max(below, least), min(max(below + step, least), most)})
    return f"one of {fits} would fit" if len(fits) > 1 else f"{fits[0]} would fit"


def _token_step(run_file: RunFile) -> int:
    """Return what the tokens of a sample must be a multiple of."""
    cp, tp = run_file.parallel.cp, run_file.parallel.tp
    return cp * lcm(2, tp) if cp > 1 else tp


def _context_problems(run_file: RunFile, choose: Choose) -> list[str]:
    """Refuse heads that cannot be exchanged for positions; the ring takes any number of them."""
    parallel, model = run_file.parallel, run_file.model
    cp, tp = parallel.cp, parallel.tp
    if cp == 1 or parallel.context == "ring":
        return []
    heads = [need for kind in model.known_kinds for need in kind.needs(model) if need.axis == "heads"]
    broken = next((need for need in heads if not need.allows(cp * tp)), None)
    if broken is None:
        return []
    allowed = [size for size in divisors(broken.size) if all(need.allows(size * tp) for need in heads)]
    fits = choose("parallel.cp", {size: with_keys(run_file, "parallel", cp=size) for size in allowed})
    ways = f'"ring", or one of {nearest(fits, cp)} as parallel.cp, would fit' if fits else '"ring" would fit'
    return [problem("parallel.context", parallel.context, f"cp * tp = {cp * tp} {broken.rule}", ways)]


def _exchange_problems(run_file: RunFile) -> list[str]:
    """Refuse DeepEP where it has nothing to do, or cannot do it on any machine."""
    if run_file.parallel.expert_exchange == "all_to_all":
        return []
    rows = [
        (run_file.parallel.ep == 1, "exchanges tokens over parallel.ep, which is 1"),
        (
            run_file.run.device not in ("auto", "cuda"),
            f'runs on NVIDIA GPUs, not on run.device = "{run_file.run.device}"',
        ),
        (
            run_file.model.moe is not None and run_file.model.moe.expert_dropout > 0,
            "does not send the numbers that model.moe.expert_dropout is drawn by",
        ),
        (
            run_file.train.precision in ("fp32", "fp64"),
            f'moves bf16, and train.precision = "{run_file.train.precision}"',
        ),
    ]
    way_out = '"all_to_all" would fit'
    return [problem("parallel.expert_exchange", "deep_ep", rule, way_out) for is_refused, rule in rows if is_refused]


def _expert_problems(run_file: RunFile) -> list[str]:
    """Refuse to split experts where there are none."""
    if run_file.model.moe is not None:
        return []
    axes = {"ep": run_file.parallel.ep, "etp": run_file.parallel.etp}
    rule = "splits experts, and the model has none (no table [model.moe])"
    return [problem(f"parallel.{key}", size, rule, "1 would fit") for key, size in axes.items() if size > 1]
