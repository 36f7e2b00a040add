"""What the axes of [parallel] ask of the model and the samples: which sizes must divide, and which sizes would.

    tp      num_heads, ffn_hidden_size, the shared expert's width; num_kv_heads divides tp or is divided by it
    cp, tp  the tokens of a sample; with Ulysses also num_heads
    ep      num_experts          etp     expert_hidden_size

A vocabulary need not divide: it is padded. Nothing here loads torch.
"""

from math import lcm

from meshwright.launcher.runfile.messages import problem
from meshwright.launcher.runfile.tables import RunFile
from meshwright.model.pattern import LayerKinds
from meshwright.parallel.fits import divisors, nearest


def layout_problems(run_file: RunFile) -> list[str]:
    """Return every size of the model and of the samples that the axes do not divide."""
    return [
        *_head_problems(run_file),
        *_width_problems(run_file),
        *_token_problems(run_file),
        *_context_problems(run_file),
        *_exchange_problems(run_file),
        *_expert_problems(run_file),
    ]


def _head_problems(run_file: RunFile) -> list[str]:
    tp, model = run_file.parallel.tp, run_file.model
    if not any(kinds.mixer == "attention" for kinds in _layers(run_file)):
        return []
    heads, kv_heads = model.num_heads, model.num_kv_heads
    fits = [size for size in divisors(heads) if kv_heads % size == 0 or size % kv_heads == 0]
    if heads % tp != 0:
        rule = f"must divide model.num_heads = {heads}"
    elif kv_heads % tp != 0 and tp % kv_heads != 0:
        rule = f"must divide model.num_kv_heads = {kv_heads}, or be a multiple of it"
    else:
        return []
    return [problem("parallel.tp", tp, rule, f"one of {nearest(fits, tp)} would fit")]


def _width_problems(run_file: RunFile) -> list[str]:
    tp, model = run_file.parallel.tp, run_file.model
    kinds = {layer.feedforward for layer in _layers(run_file)}
    widths = {"model.ffn_hidden_size": model.ffn_hidden_size} if "mlp" in kinds else {}
    if "moe" in kinds and model.moe is not None and model.moe.num_shared_experts:
        widths["model.moe.num_shared_experts * expert_hidden_size"] = model.moe.shared_hidden_size
    return [
        problem("parallel.tp", tp, f"must divide {name} = {size}", f"one of {nearest(divisors(size), tp)} would fit")
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


def _context_problems(run_file: RunFile) -> list[str]:
    """Refuse heads that cannot be exchanged for positions; the ring takes any number of them."""
    parallel, heads = run_file.parallel, run_file.model.num_heads
    cp, tp = parallel.cp, parallel.tp
    if cp == 1 or parallel.context == "ring" or heads % (cp * tp) == 0:
        return []
    rule = f"cp * tp = {cp * tp} must divide model.num_heads = {heads}"
    fits = [size for size in divisors(heads) if heads % (size * tp) == 0]
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


def _expert_problems(run_file: RunFile) -> list[str]:
    parallel, moe = run_file.parallel, run_file.model.moe
    axes = {"ep": parallel.ep, "etp": parallel.etp}
    if moe is None:
        rule = "splits experts, and the model has none (no table [model.moe])"
        return [problem(f"parallel.{key}", size, rule, "1 would fit") for key, size in axes.items() if size > 1]
    sizes = {"ep": ("model.moe.num_experts", moe.num_experts)}
    sizes["etp"] = ("model.moe.expert_hidden_size", moe.expert_hidden_size)
    return [
        problem(
            f"parallel.{key}",
            axes[key],
            f"must divide {name} = {size}",
            f"one of {nearest(divisors(size), axes[key])} would fit",
        )
        for key, (name, size) in sizes.items()
        if size % axes[key] != 0
    ]


def _layers(run_file: RunFile) -> tuple[LayerKinds, ...]:
    """Return the layers' kinds; none where the pattern is no pattern, which is told elsewhere."""
    return () if run_file.model.problems() else run_file.model.layers
