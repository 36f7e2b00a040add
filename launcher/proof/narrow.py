"""A smaller run with the same features: small enough for a few CPU ranks, alike in everything that can go wrong.

    kept        every feature and every kind of layer; what divides by what, and what does not: heads and KV heads by
                tp (KV heads fewer than tp stay fewer), experts by ep, inner widths by tp and etp, the vocabulary by tp
                or not; width = heads * head_dim, or not; one expert on a rank, or several; a
                rank's widths a multiple of 16 bytes, or not
    made small  widths, heads, experts, layers (whole periods, at least one for each stage), the sequence, the batch,
                the schedule: the proof's few steps have its warm-up, its peak and its way down
                the limit of the gradient's norm, so that every step is clipped where a long run's first steps are
    put aside   what is no part of the computation: the store (tokens are counted, `counted.py`), the device,
                weights to begin from, the compiler

Below, `many` is what a size must divide by in all sub-layouts together (`Needs`). No torch is needed here.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil, lcm
from typing import Any

from meshwright.launcher.runfile.resume_rules import Change, changed_keys
from meshwright.launcher.runfile.tables import RunFile
from meshwright.launcher.runfile.would_fit import with_keys
from meshwright.model.config import ModelConfig
from meshwright.model.kinds.small import ALIGNED, Needs, Small, small_head_dim
from meshwright.model.kinds.table import KINDS
from meshwright.model.kinds.unread import filled_in
from meshwright.model.pattern import letters_of, parse_pattern, parse_placed
from meshwright.parallel.config import RecomputeConfig
from meshwright.parallel.mesh import Sizes

STEPS = 3
"""Updates that are compared."""
_SEQUENCE = 32
_VOCABULARY, _ODD_VOCABULARY = 64, 61
_PERIOD = 4  # layers; a longer period keeps the first layer of each kind
_CLIP = 0.01
"""What a narrow run is clipped to: its norms are about 0.5, whatever the model, because the loss is a mean."""


@dataclass(frozen=True)
class Narrowed:
    """The small run, and every key in which it differs from the user's."""

    run_file: RunFile
    changes: tuple[Change, ...]


def narrow(run_file: RunFile, target: Sizes, layouts: Sequence[Sizes]) -> Narrowed:
    """Return the run that stands for `run_file` on `target` and fits on each of `layouts`."""
    needs = Needs.of([*layouts, Sizes()], run_file.pipeline.stages_held, run_file.parallel.context)
    updates = {
        "run": {"device": "cpu", "timeout_seconds": 60},
        "data": {"store": "counted", "seq_len": _sequence(run_file.data.seq_len, needs)},
        "parallel": {"expert_exchange": "all_to_all"},  # the only one on a CPU
        "train": _train(run_file, target, needs),
        "learning_rate": {"warmup_steps": min(run_file.learning_rate.warmup_steps, 1)},
        "checkpoint": {"every": 0, "keep_every": 0},
        # After each step; one sample less than the ranks share evenly.
        "evaluation": {
            "every": min(run_file.evaluation.every, 1),
            "samples": min(run_file.evaluation.samples, 4 * needs.dp - 1),
        },
        "init": {"source": "", "load": "weights"},
    }
    model = _model(run_file.model, target, needs)
    updates["recompute"] = {"every": min(run_file.recompute.every, max(1, model.num_layers // 2))}
    small = run_file.model_copy(
        update={name: getattr(run_file, name).model_copy(update=table) for name, table in updates.items()}
        | {"model": model}
    )
    return Narrowed(small, tuple(changed_keys(run_file, small)))


def alone(run_file: RunFile) -> RunFile:
    """Return what one process runs: the same batch, cut into other micro-batches than any rank's.

    What goes wrong in each micro-batch would else go wrong on both sides. One process takes the whole batch at once;
    where that is what a rank does too, sample by sample. It recomputes nothing, so that what recomputing does shows.
    """
    train = run_file.train
    sizes = [train.global_batch_size, *(entry.global_batch_size for entry in train.batch_ramp)]
    at_once = 1 if min(sizes) == train.micro_batch_size else max(sizes)
    table = on_layout(run_file, Sizes())
    updates = {"train": train.model_copy(update={"micro_batch_size": at_once}), "recompute": RecomputeConfig()}
    return table.model_copy(update=updates)


def on_layout(run_file: RunFile, sizes: Sizes) -> RunFile:
    """Return the run file with the axes of a layout in [parallel]."""
    return with_keys(run_file, "parallel", **asdict(sizes))


def _model(model: ModelConfig, target: Sizes, needs: Needs) -> ModelConfig:
    small = Small(target, needs)
    sizes = _widths(model, small)
    pattern, period = _pattern(model.pattern)
    layers = period * ceil(max(needs.stages, 2) / period)
    is_shared = model.held_layers < model.num_layers
    if is_shared:
        layers = 2 * period
    divides = model.vocab_size % target.tp == 0
    sizes |= {
        "preset": "",
        "pattern": pattern,
        "distinct_layers": period if is_shared else layers if model.distinct_layers else 0,
        # Five layers of a period of five, which became one of two, are six where there are five stages.
        "num_layers": min(layers, model.num_layers) if pattern == model.pattern and not is_shared else layers,
        # 0 is the tokenizer's size, rounded up to a multiple of 64, which the counted store has.
        "vocab_size": 0 if not model.vocab_size else _vocabulary(needs.tp) if divides else _ODD_VOCABULARY,
    }
    if model.max_positions:
        sizes["max_positions"] = max(_sequence(model.max_positions, needs), 2 * _SEQUENCE)
    if model.multi_token:
        sizes["multi_token"] = model.multi_token.model_copy(update={"depth": min(model.further_tokens, 2)})
        if sizes["hidden_size"] % needs.tp:  # its projection is cut over tp
            step = needs.tp * ALIGNED
            sizes["hidden_size"] = step * (sizes["hidden_size"] // step + 1)
    above = max(sizes["hidden_size"], sizes.get("num_heads", 0) * sizes.get("head_dim", 0))
    for kind in dict.fromkeys([KINDS["mlp"], *model.part_kinds]):  # the MLP's width is filled in, whoever uses it
        found = kind.narrowed(model.model_copy(update=sizes), small, above)
        sizes |= found
        above = max([above, *(size for size in found.values() if isinstance(size, int))])
    small_model = model.model_copy(update=sizes)
    # What no kind reads is as if it had been left out; a copy fills nothing in.
    read = frozenset[str]().union(*(kind.reads for kind in model.part_kinds))
    unread = [key for key in ("num_kv_heads", "head_dim", "ffn_hidden_size") if key not in read]
    return small_model.model_copy(update={key: filled_in(small_model, key) for key in unread})


def _widths(model: ModelConfig, small: Small) -> dict[str, Any]:
    """Return the width of the stream, and the heads of attention where the model has any."""
    if not model.num_heads:
        return {"hidden_size": ALIGNED * (small.needs.heads + 1) + model.hidden_size % ALIGNED}
    heads, kv_heads = small.heads(model.num_heads, model.num_kv_heads)
    head_dim = min(model.head_dim, 8 + model.head_dim % 8)
    if model.hidden_size == model.num_heads * model.head_dim:
        head_dim = small_head_dim(heads, head_dim, model.hidden_size)
        hidden = heads * head_dim
    else:
        hidden = ALIGNED * (heads * head_dim // ALIGNED + 1) + model.hidden_size % ALIGNED
    sizes = {"hidden_size": hidden, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
    return sizes | _turned(model, head_dim)


def _turned(model: ModelConfig, head_dim: int) -> dict[str, Any]:
    """Return how much of a small head is turned, where the model's share of it makes no pairs, or only the first."""
    turned, needed = int(head_dim * model.rope_fraction), 2
    if model.rope_scaling is not None and model.rope_scaling.kind == "ntk":
        needed = 4  # the first pair does not know the base
    if model.position != "rope" or model.rope_fraction == 1.0 or (turned >= needed and turned % 2 == 0):
        return {}
    return {"rope_fraction": 4 / head_dim}


def _vocabulary(many: int) -> int:
    return many * ceil(_VOCABULARY / many)


def _pattern(pattern: str) -> tuple[str, int]:
    """Return a pattern with every kind of layer, and the length of its period: the same one unless it is long."""
    period, placed = parse_pattern(pattern), parse_placed(pattern).values()
    if len(period) <= _PERIOD and not placed:
        return pattern, len(period)
    kinds = tuple(dict.fromkeys([*placed, *period]))
    short = "".join(map(letters_of, kinds))
    if parse_pattern(short) == kinds:
        return short, len(kinds)
    # A layer without a mixer reads as part of the one before it, if that has no feed-forward: each gets its number.
    return f"{letters_of(kinds[0])} " + " ".join(f"@{at} {letters_of(of)}" for at, of in enumerate(kinds)), len(kinds)


def _sequence(length: int, needs: Needs) -> int:
    """Return a length that each rank gets equal parts of, in two chunks where the axis cp cuts it so.

    A short sample stays short, but for what the small layouts ask for: 6 tokens on cp = 3 become 8 on cp = 2.
    """
    part = needs.tp * needs.cp * (2 if needs.cp > 1 else 1)
    return part * ceil(min(_SEQUENCE, length) / part)


def _train(run_file: RunFile, target: Sizes, needs: Needs) -> dict[str, Any]:
    """Return a batch with more than one micro-batch where the run has that, and the few steps."""
    train = run_file.train
    at_once = min(train.micro_batch_size, 2)
    of_a_rank = train.global_batch_size // (target.dp_replicate * target.dp_shard)
    accumulated = 3 if of_a_rank > train.micro_batch_size else 1
    if needs.pp > 1:  # what every schedule takes: whole rounds of the ranks, and as many as there are stages
        accumulated = 2 * lcm(needs.pp, needs.stages)
    if needs.dp * at_once * accumulated == 1:  # every fourth sample alone would be a step without a target
        accumulated = 2
    batch = needs.dp * at_once * accumulated
    ramp = train.batch_ramp[:1]
    return {
        # One more than are made, so that no learning rate of the proof is that of a last step, which may be 0.
        "steps": STEPS + 1,
        "global_batch_size": batch * 2 if ramp else batch,
        "micro_batch_size": at_once,
        "clip_norm": min(train.clip_norm, _CLIP),
        "batch_ramp": tuple(e.model_copy(update={"samples": batch, "global_batch_size": batch}) for e in ramp),
        "compile": False,
        "threads": 1,
    }
