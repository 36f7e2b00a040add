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
from math import ceil, gcd, lcm
from typing import Any, NamedTuple

from meshwright.launcher.runfile.resume_rules import Change, changed_keys
from meshwright.launcher.runfile.tables import RunFile
from meshwright.launcher.runfile.would_fit import with_keys
from meshwright.model.config import ModelConfig, MoeConfig
from meshwright.model.pattern import FEEDFORWARDS, MIXERS, LayerKinds, parse_pattern
from meshwright.parallel.mesh import Sizes

STEPS = 3
"""Updates that are compared."""
_SEQUENCE = 32
_VOCABULARY, _ODD_VOCABULARY = 64, 61
_PERIOD = 4  # layers; a longer period keeps the first layer of each kind
_CLIP = 0.01
"""What a narrow run is clipped to: its norms are about 0.5, whatever the model, because the loss is a mean."""
_ALIGNED = 8  # numbers of bf16 in the 16 bytes that grouped products ask for


class Needs(NamedTuple):
    """By what the sizes of the small run must divide, over all the layouts that it will run on."""

    tp: int
    heads: int
    """What the heads are cut into: tp, and cp too where attention exchanges heads for tokens."""
    fewest_tp: int
    """The smallest size of tp above 1, or 1."""
    pp: int
    stages: int
    """Stages of a pipeline, all ranks' together."""
    cp: int
    ep: int
    etp: int
    dp: int

    @classmethod
    def of(cls, layouts: Sequence[Sizes], stages_per_rank: int, context: str) -> "Needs":
        """Collect the sizes of the axes."""
        named = {name: lcm(*(getattr(sizes, name) for sizes in layouts)) for name in ("tp", "pp", "cp", "ep", "etp")}
        stages = max(sizes.pp * stages_per_rank if sizes.pp > 1 else 1 for sizes in layouts)
        heads = lcm(*(sizes.tp * (sizes.cp if context == "ulysses" else 1) for sizes in layouts))
        above_one = [sizes.tp for sizes in layouts if sizes.tp > 1]
        return cls(
            **named,
            stages=stages,
            heads=heads,
            fewest_tp=min(above_one, default=1),
            dp=lcm(*(sizes.dp_replicate * sizes.dp_shard for sizes in layouts)),
        )


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
    where that is what a rank does too, sample by sample.
    """
    train = run_file.train
    sizes = [train.global_batch_size, *(entry.global_batch_size for entry in train.batch_ramp)]
    at_once = 1 if min(sizes) == train.micro_batch_size else max(sizes)
    table = on_layout(run_file, Sizes())
    return table.model_copy(update={"train": train.model_copy(update={"micro_batch_size": at_once})})


def on_layout(run_file: RunFile, sizes: Sizes) -> RunFile:
    """Return the run file with the axes of a layout in [parallel]."""
    return with_keys(run_file, "parallel", **asdict(sizes))


def _model(model: ModelConfig, target: Sizes, needs: Needs) -> ModelConfig:
    heads, kv_heads = _heads(model, target, needs)
    head_dim = min(model.head_dim, 8 + model.head_dim % 8)
    if model.hidden_size == model.num_heads * model.head_dim:
        head_dim = _head_dim(heads, head_dim, model.hidden_size)
        hidden = heads * head_dim
    else:
        hidden = _ALIGNED * (heads * head_dim // _ALIGNED + 1) + model.hidden_size % _ALIGNED
    ffn = _inner(model.ffn_hidden_size, target.tp, needs.tp, above=max(hidden, heads * head_dim))
    pattern, period = _pattern(model.pattern)
    layers = period * ceil(max(needs.stages, 2) / period)
    divides = model.vocab_size % target.tp == 0
    sizes: dict[str, Any] = {
        "preset": "",
        "pattern": pattern,
        # Five layers of a period of five, which became one of two, are six where there are five stages.
        "num_layers": min(layers, model.num_layers) if pattern == model.pattern else layers,
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "ffn_hidden_size": ffn,
        # 0 is the tokenizer's size, rounded up to a multiple of 64, which the counted store has.
        "vocab_size": 0 if not model.vocab_size else _vocabulary(needs.tp) if divides else _ODD_VOCABULARY,
    }
    if model.moe is not None:
        sizes["moe"] = _moe(model.moe, target, needs, above=ffn)
    return model.model_copy(update=sizes)


def _heads(model: ModelConfig, target: Sizes, needs: Needs) -> tuple[int, int]:
    """Return numbers of heads that relate to each other, and to what they are cut into, as the model's do."""
    heads, kv_heads, many, tp = model.num_heads, model.num_kv_heads, needs.tp, target.tp
    group = heads // kv_heads
    if kv_heads < tp:  # several ranks hold copies of one KV head, and several heads are there if tp leaves room
        return needs.heads * min(2, max(1, heads // tp)), 2 if kv_heads > 1 and needs.fewest_tp >= 4 else 1
    # Where a rank's key heads do not divide over cp, attention that exchanges them repeats them: so must these few.
    are_repeated = needs.heads > needs.tp and kv_heads // tp % target.cp != 0
    several = 3 if are_repeated and needs.cp % 2 == 0 else 2
    few = 1 if kv_heads == 1 else many * (1 if kv_heads == tp else several)
    few_heads = few * (1 if group == 1 else 3 if group % 2 else 2)
    return few_heads * (needs.heads // gcd(needs.heads, few_heads)), few


def _head_dim(heads: int, at_least: int, hidden_size: int) -> int:
    """Return a width of a head with which all together are aligned as `hidden_size` is, if there is one."""
    wanted = gcd(hidden_size, _ALIGNED)
    fitting = (dim for dim in range(at_least, at_least + _ALIGNED + 1, 2) if gcd(heads * dim, _ALIGNED) == wanted)
    return next(fitting, at_least)


def _inner(size: int, axis: int, many: int, *, above: int) -> int:
    """Return an inner width above another, so that no two dims are equal, that splits as `size` splits over `axis`."""
    rest = size // axis % _ALIGNED
    return many * (_ALIGNED * (above // (many * _ALIGNED) + 1) + rest)


def _moe(moe: MoeConfig, target: Sizes, needs: Needs, *, above: int) -> MoeConfig:
    of_a_rank = moe.num_experts // target.ep
    few = 1 if of_a_rank == 1 else 3 if of_a_rank % 2 else 2
    top_k = min(moe.top_k, 2)
    experts = needs.ep * few
    while experts < min(moe.num_experts, top_k + 1):
        experts += needs.ep * few
    shared = min(moe.num_shared_experts, 2)
    return moe.model_copy(
        update={
            "num_experts": experts,
            "top_k": experts if moe.top_k == moe.num_experts else top_k,
            "expert_hidden_size": _expert_width(moe.expert_hidden_size, target.etp, needs, shared, above=above),
            "num_shared_experts": shared,
        }
    )


def _expert_width(size: int, etp: int, needs: Needs, shared: int, *, above: int) -> int:
    """Return a width that etp splits as it splits `size`, and of whose shared experts tp makes equal parts."""
    first = _inner(size, etp, needs.etp, above=above)
    widths = (first + step * needs.etp * _ALIGNED for step in range(needs.tp))
    fitting = (width for width in widths if width * shared % needs.tp == 0)
    return next(fitting, lcm(needs.etp, needs.tp) * first)


def _vocabulary(many: int) -> int:
    return many * ceil(_VOCABULARY / many)


def _pattern(pattern: str) -> tuple[str, int]:
    """Return a pattern with every kind of layer, and its length: the same one unless it is long."""
    period = parse_pattern(pattern)
    if len(period) <= _PERIOD:
        return pattern, len(period)
    kinds = tuple(dict.fromkeys(period))
    written = "".join(_letters(kind) for kind in kinds)
    # A layer without a mixer reads as part of the one before it, if that has no feed-forward.
    return (written, len(kinds)) if parse_pattern(written) == kinds else (pattern, len(period))


def _letters(kinds: LayerKinds) -> str:
    of_kind = {kind: letter for letters in (MIXERS, FEEDFORWARDS) for letter, kind in letters.items()}
    return "".join(of_kind[kind] for kind in kinds if kind is not None)


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
