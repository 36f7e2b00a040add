"""What the axes of [parallel] ask of the model and the samples: which sizes must divide, and which sizes would.

    tp      num_heads, ffn_hidden_size, the shared expert's width; num_kv_heads divides tp or is divided by it
    cp, tp  the tokens of a sample; with Ulysses also num_heads
    ep      num_experts          etp     expert_hidden_size

A vocabulary need not divide: it is padded. Nothing here loads torch.
"""

from math import lcm

from meshwright.launcher.runfile.messages import problem
from meshwright.launcher.runfile.tables import RunFile
from meshwright.launcher.runfile.would_fit import Choose, all_of, with_keys
from meshwright.model.pattern import kinds_in
from meshwright.parallel.fits import divisors, nearest


def layout_problems(run_file: RunFile, choose: Choose = all_of) -> list[str]:
    """Return every size of the model and of the samples that the axes do not divide.

    What is wrong with the model in itself stands beside it; only a pattern that is none leaves nothing to look at.
    """
    return [
        *_head_problems(run_file, choose),
        *_width_problems(run_file, choose),
        *_token_problems(run_file),
        *_context_problems(run_file, choose),
        *_exchange_problems(run_file),
        *_expert_problems(run_file, choose),
    ]


def _head_problems(run_file: RunFile, choose: Choose) -> list[str]:
    tp, model = run_file.parallel.tp, run_file.model
    if not any(kinds.mixer == "attention" for kinds in kinds_in(model.pattern)):
        return []
    heads, kv_heads = model.num_heads, model.num_kv_heads
    are_groups = heads % kv_heads == 0  # if not, other key heads are needed, and those are what counts
    fits = [size for size in divisors(heads) if not are_groups or kv_heads % size == 0 or size % kv_heads == 0]
    if heads % tp != 0:
        rule = f"must divide model.num_heads = {heads}"
    elif tp not in fits:
        rule = f"must divide model.num_kv_heads = {kv_heads}, or be a multiple of it"
    else:
        return []
    return [_axis_problem(run_file, "tp", rule, fits, choose)]


def _axis_problem(run_file: RunFile, axis: str, rule: str, allowed: list[int], choose: Choose) -> str:
    """Return the line for an axis with which a size of the model does not go; `allowed` are those that do."""
    key, size = f"parallel.{axis}", getattr(run_file.parallel, axis)
    fits = choose(key, {other: with_keys(run_file, "parallel", **{axis: other}) for other in allowed})
    return problem(key, size, rule, f"one of {nearest(fits, size)} would fit")


def _width_problems(run_file: RunFile, choose: Choose) -> list[str]:
    tp, model = run_file.parallel.tp, run_file.model
    kinds = {layer.feedforward for layer in kinds_in(model.pattern)}
    widths = {"model.ffn_hidden_size": model.ffn_hidden_size} if "mlp" in kinds else {}
    if "moe" in kinds and model.moe is not None and model.moe.num_shared_experts:
        widths["model.moe.num_shared_experts * expert_hidden_size"] = model.moe.shared_hidden_size
    return [
        _axis_problem(run_file, "tp", f"must divide {name} = {size}", divisors(size), choose)
        for name, size in widths.items()
        if size % tp != 0
    ]


def _token_problems(run_file: RunFile) -> list[str]:
    """Refuse samples whose tokens cannot be cut evenly between layers."""
    cp, tp, seq_len = run_file.parallel.cp, run_file.parallel.tp, run_file.data.seq_len
    step, rule = tp, f"parallel.tp = {tp}, whose ranks share its tokens between layers"
    if cp > 1:
        step = cp * lcm(2, tp)
        rule = f"{step}: each rank of cp = {cp} holds two chunks of it, each rank of tp = {tp} a stretch of these"
    if seq_len % step == 0:
        return []
    below = seq_len // step * step
    fits = [size for size in (below, below + step) if size > 0]
    return [problem("data.seq_len", seq_len, f"must be a multiple of {rule}", f"one of {fits} would fit")]


def _context_problems(run_file: RunFile, choose: Choose) -> list[str]:
    """Refuse heads that cannot be exchanged for positions; the ring takes any number of them."""
    parallel, heads = run_file.parallel, run_file.model.num_heads
    cp, tp = parallel.cp, parallel.tp
    if cp == 1 or parallel.context == "ring" or heads % (cp * tp) == 0:
        return []
    rule = f"cp * tp = {cp * tp} must divide model.num_heads = {heads}"
    allowed = [size for size in divisors(heads) if heads % (size * tp) == 0]
    fits = choose("parallel.cp", {size: with_keys(run_file, "parallel", cp=size) for size in allowed})
    ways = f'"ring", or one of {nearest(fits, cp)} as parallel.cp, would fit' if fits else '"ring" would fit'
    return [problem("parallel.context", parallel.context, rule, ways)]


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
            run_file.train.precision in ("fp32", "fp64"),
            f'moves bf16, and train.precision = "{run_file.train.precision}"',
        ),
    ]
    way_out = '"all_to_all" would fit'
    return [problem("parallel.expert_exchange", "deep_ep", rule, way_out) for is_refused, rule in rows if is_refused]


def _expert_problems(run_file: RunFile, choose: Choose) -> list[str]:
    parallel, moe = run_file.parallel, run_file.model.moe
    axes = {"ep": parallel.ep, "etp": parallel.etp}
    if moe is None:
        rule = "splits experts, and the model has none (no table [model.moe])"
        return [problem(f"parallel.{key}", size, rule, "1 would fit") for key, size in axes.items() if size > 1]
    sizes = {"ep": ("model.moe.num_experts", moe.num_experts)}
    sizes["etp"] = ("model.moe.expert_hidden_size", moe.expert_hidden_size)
    return [
        _axis_problem(run_file, key, f"must divide {name} = {size}", divisors(size), choose)
        for key, (name, size) in sizes.items()
        if size % axes[key] != 0
    ]
