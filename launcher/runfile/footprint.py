"""What a rank holds, in bytes: weights, masters, gradients at most, and moments under each ZeRO stage.

    N weights over d ranks that shard state; c bytes in the type computed with, m in the type updated in (at least fp32)

    stage   weights   masters             moments
    0       c*N       m*N if c < m        2*m*N
    1       c*N       m*N/d if c < m      2*m*N/d
    2       c*N       m*N/d               2*m*N/d      the weights are gathered once a step
    3       -         m*N/d               2*m*N/d      one layer at a time is gathered, not counted

Gradients at most, which is in the last backward of a step or in its reduction. P is the largest parameter, B the
largest bucket (buckets.py), U the largest unit that FSDP2 reduces (a layer, its experts, or what is around the layers):

    stage   whole backwards            backwards taken apart (by some schedules of a pipeline)
    0       m*N + c*P                  m*N + c*N + c*P
    1       m*N + m*N/d + c*P          m*N + m*N/d + c*B    c*N + m*N/d + c*P, if that is more
    2       m*N/d + c*H + (c+m)*U      m*N + m*U
    3       m*N/d + c*H + (c+m)*U      refused

    m*N + c*P   all buckets are open, and the last gradient is on its way into one.
    m*N/d       where sums land, beside what is sent. Stage 0 sums in place.
    c*N         backwards taken apart call no hooks: gradients add up in `.grad` (c*P: the one that is added) and are
                moved when the schedule is through, each bucket made while the gradients that fill it are still there.
    (c+m)*U     FSDP2 copies a unit's gradients into what it sends, and keeps that until the next unit is copied. H is
                what is open from the begin of a backward to its end: the gradients of the output and the last norm.
                While a unit's sums land it has let go of all of its gradients but the last: where that is more, the
                unit counts as c*P + m*U + m*U/d, with the largest of its parameters.
    m*N + m*U   there it keeps whole gradients until the schedule is through, then reduces unit by unit; as above
                c*P + m*U/d where that is more than m*U.

With copies (dp_replicate) stages 2 and 3 sum the parts over them in m*N/d more, after the reduction.

Dense weights have d = dp_shard * cp, and N is what tp leaves of them: matrices are cut, key and value heads as far as
there are heads, a vocabulary in equal rows with padding; norms and routers are whole. Routed experts are cut by ep and
etp, and d = edp. With d = 1 stages 1 to 3 are stage 0. Dims that do not divide by d are cut like torch.chunk: the first
ranks hold up to a row more of each than these averages say. With a pipeline N are the weights of a rank's stages, and
what the rank with most holds is returned. A sum on its way takes as much again as it sums on CPU ranks (at most two
buckets, or U), which is not counted. What a micro-batch keeps for its backward is counted beside it; the layer
that is gathered and the library's own memory come on top.

Muon has one moment where AdamW has two: of what it updates m*N and m*N/d.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from meshwright.kernels.limits import USUAL, Limits
from meshwright.launcher.runfile.optimizer_rules import settings_of
from meshwright.launcher.runfile.tables import RunFile
from meshwright.launcher.stages import layers_held, stages_of
from meshwright.model.counts.activations import ActivationBytes, Held, activation_bytes, held_by
from meshwright.model.counts.shapes import embedding_weights, head_weights, layer_weights
from meshwright.model.kinds.kind import Degrees, Types, Weight

COMPUTE_BYTES = {"fp32": 4, "bf16_autocast": 4, "bf16": 2, "fp64": 8}
UPDATE_BYTES = {"fp32": 4, "bf16_autocast": 4, "bf16": 4, "fp64": 8}
EMBEDDING = "embedding.weight"


class StateBytes(NamedTuple):
    """Bytes on one rank, by what they hold; gradients at the moment of a step when there are most."""

    weights: float
    masters: float
    gradients: float
    moments: float

    @property
    def total(self) -> float:
        """Return the sum."""
        return sum(self)


def state_bytes(run_file: RunFile, world_size: int, limits: Limits = USUAL) -> StateBytes:
    """Return what one rank of `world_size` holds, the one that holds most; the run file must have passed its checks.

    With `model.vocab_size` = 0 the embedding is not counted: nobody knows its size yet.
    """
    of_ranks = [state_of_rank(run_file, world_size, pp_rank, limits) for pp_rank in range(run_file.parallel.pp)]
    return max(of_ranks, key=lambda state: state.total)


def state_of_rank(run_file: RunFile, world_size: int, pp_rank: int, limits: Limits = USUAL) -> StateBytes:
    """Return what a rank at one place in the pipeline holds."""
    precision, stage = run_file.train.precision, run_file.zero.stage
    compute, update = float(COMPUTE_BYTES[precision]), float(UPDATE_BYTES[precision])
    held, shards = held_weights(run_file, pp_rank), _shards(run_file, world_size)
    weights = masters = moments = 0.0
    for number, muon, d in (
        (held.dense, held.dense_of_muon, shards[False]),
        (held.experts, held.experts_of_muon, shards[True]),
    ):
        of_kind = stage if d > 1 else 0
        weights += 0.0 if of_kind == 3 else compute * number
        if compute < update or of_kind >= 2:
            masters += update * number / (d if of_kind >= 1 else 1)
        moments += update * (2 * number - muon) / (d if of_kind >= 1 else 1)
    return StateBytes(weights, masters, _gradients_at_most(run_file, shards, pp_rank, limits), moments)


def _shards(run_file: RunFile, world_size: int) -> dict[bool, int]:
    """Return over how many ranks state is cut: by whether it is that of experts."""
    parallel = run_file.parallel
    return {False: parallel.dp_shard_in(world_size) * parallel.cp, True: parallel.edp_in(world_size)}


class HeldWeights(NamedTuple):
    """How many weights a rank computes with."""

    dense: int
    experts: int
    dense_of_muon: int
    """Those of the dense ones that Muon updates."""
    experts_of_muon: int


def held_weights(run_file: RunFile, pp_rank: int = 0) -> HeldWeights:
    """Count the weights that a rank computes with, at one place in the pipeline."""
    counts = dict.fromkeys([(of_experts, of_muon) for of_experts in (False, True) for of_muon in (False, True)], 0)
    for name, weight, number in _held(run_file, pp_rank):
        of_muon = settings_of(name, weight.shape, run_file.optimizer).kind == "muon"
        counts[weight.is_of_experts, of_muon] += number
    dense, experts = (counts[of_experts, False] + counts[of_experts, True] for of_experts in (False, True))
    return HeldWeights(dense, experts, counts[False, True], counts[True, True])


HeldWeight = tuple[str, Weight, int]
"""A parameter's name, what it is, and how many of its numbers a rank computes with."""


def _held(run_file: RunFile, pp_rank: int) -> Iterator[HeldWeight]:
    """Yield what a rank of the stages at this place in the pipeline computes with."""
    model = run_file.model
    held, last, kinds = layers_held(run_file, pp_rank), stages_of(run_file).count - 1, model.layers
    if 0 in held or (last in held and model.embeds_at_both_ends):
        yield from _cut(run_file, "", embedding_weights(model))
    for layers in held.values():
        for number in layers[: max(0, model.held_layers - layers.start)]:  # others use the weights of these
            yield from _cut(run_file, f"layers.{number}.", layer_weights(model, kinds[number]))
    if last in held:
        yield from _cut(run_file, "", head_weights(model))


def _cut(run_file: RunFile, prefix: str, found: Mapping[str, Weight]) -> Iterator[HeldWeight]:
    for name, weight in found.items():
        yield prefix + name, weight, weight.on_a_rank(run_file.parallel)


def micro_batch_bytes(run_file: RunFile, world_size: int) -> ActivationBytes:
    """Return what one micro-batch keeps on a rank; at most that where recompute is neither "none" nor "full".

    With a pipeline it is that of all stages of the rank that keeps most.
    """
    return max(
        (_activations_of(run_file, world_size, rank) for rank in range(run_file.parallel.pp)),
        key=lambda found: found.total,
    )


def _activations_of(run_file: RunFile, world_size: int, pp_rank: int) -> ActivationBytes:
    parallel, precision = run_file.parallel, run_file.train.precision
    types = {
        "fp32": Types(4, 4),
        "bf16_autocast": Types(4, 2, is_cast=True),
        "bf16": Types(2, 2),
        "fp64": Types(8, 8),
    }[precision]
    samples = run_file.train.global_batch_size // parallel.dp_in(world_size)
    samples = min(run_file.train.micro_batch_size, samples)
    tokens = samples * run_file.data.seq_len
    spread = Degrees(parallel.cp, parallel.tp, parallel.etp, parallel.context)
    # Who asks may not be the machine that trains: where the run file does not say, the larger.
    logits = USUAL.logits(run_file.run.device)
    here = activations_held(run_file, pp_rank)
    return activation_bytes(run_file.model, tokens, spread, types, here, samples=samples, logits=logits)


def activations_held(run_file: RunFile, pp_rank: int = 0) -> Held:
    """Return which layers a rank keeps activations of, and of which of them the inputs only."""
    recompute, held = run_file.recompute, layers_held(run_file, pp_rank)
    every = recompute.every if recompute.mode == "full" else 0
    layers = [number for stage in held.values() for number in stage]
    return held_by(run_file.model, layers, every, (0 in held, stages_of(run_file).count - 1 in held))


def _gradients_at_most(run_file: RunFile, shards: Mapping[bool, int], pp_rank: int, limits: Limits) -> float:
    """Return the most bytes of gradients that live at once in a step: the tables above, kind by kind of weight."""
    stage, precision = run_file.zero.stage, run_file.train.precision
    compute, update = float(COMPUTE_BYTES[precision]), float(UPDATE_BYTES[precision])
    whole: list[HeldWeight] = []
    cut: list[HeldWeight] = []
    for held in _held(run_file, pp_rank):
        (cut if stage >= 1 and shards[held[1].is_of_experts] > 1 else whole).append(held)
    is_apart = stages_of(run_file).splits_backward
    n_whole, n_cut = _number(whole), _number(cut)
    parts = _number_of_part(cut, shards)
    if stage <= 1:
        largest, sums = _largest([*whole, *cut]), update * (n_whole + parts)
        if not is_apart:
            return sums + update * n_cut + compute * largest
        in_backward = compute * (n_whole + n_cut + largest)
        return sums + max(in_backward, update * n_cut + compute * _largest_bucket(cut, update, limits))
    sums = update * n_whole + (compute * n_whole if is_apart else 0.0)
    on_its_way = compute * _largest(whole)
    if is_apart:
        units = _units(cut, has_both_ends=False).values()
        sent = (update * max(_number(unit), _number_of_part(unit, shards) + _largest(unit)) for unit in units)
        return sums + update * n_cut + max([on_its_way, *sent])
    over_copies = 0.0
    if run_file.parallel.dp_replicate > 1:
        over_copies = update * _number_of_part([held for held in cut if not held[1].is_of_experts], shards)
    reduced = _in_one_reduction(run_file, cut, shards, on_its_way)
    return sums + update * parts + max(over_copies, reduced)


def _number(held: list[HeldWeight]) -> int:
    return sum(number for _, _, number in held)


def _number_of_part(held: list[HeldWeight], shards: Mapping[bool, int]) -> float:
    return sum((number / shards[weight.is_of_experts] for _, weight, number in held), start=0.0)


def _largest(held: list[HeldWeight]) -> int:
    return max((number for _, _, number in held), default=0)


def _largest_bucket(cut: list[HeldWeight], update: float, limits: Limits) -> float:
    """Return how many numbers are in a bucket at most: one that is not yet full takes a parameter more."""
    kinds = [[held for held in cut if held[1].is_of_experts is of_experts] for of_experts in (False, True)]
    return float(max(min(_number(kind), limits.bucket_bytes / update + _largest(kind)) for kind in kinds))


def _units(cut: list[HeldWeight], *, has_both_ends: bool) -> dict[tuple[str, bool], list[HeldWeight]]:
    """Return what FSDP2 reduces at a time: by layer ("" is around them), and whether it is the experts of one."""
    units: dict[tuple[str, bool], list[HeldWeight]] = {}
    for held in cut:
        name, weight, _ = held
        layer = name.split(".")[1] if name.startswith("layers.") else ""
        if not has_both_ends and name == EMBEDDING:
            layer = EMBEDDING  # the first stage's, which is not the last
        units.setdefault((layer, weight.is_of_experts), []).append(held)
    return units


def _in_one_reduction(run_file: RunFile, cut: list[HeldWeight], shards: Mapping[bool, int], on_its_way: float) -> float:
    """Return the bytes of whole gradients, and of what is sent, while FSDP2 reduces one unit after the other.

    `on_its_way` is what a gradient that FSDP2 does not know takes, at most.
    """
    precision, is_tied = run_file.train.precision, run_file.model.tie_embeddings
    compute, update = float(COMPUTE_BYTES[precision]), float(UPDATE_BYTES[precision])
    units = _units(cut, has_both_ends=True)
    around = units.pop(("", False), [])
    has_output = any(name != EMBEDDING for name, _, _ in around)  # else the first stage's, which begins with a layer
    head = compute * _number([held for held in around if has_output and (is_tied or held[0] != EMBEDDING)])
    sent_before = update * max(map(_number, units.values()), default=0)
    found = [0.0]
    for (layer, of_experts), unit in [(("", False), around), *units.items()]:
        number, open_around = _number(unit), head if layer else 0.0
        if of_experts:  # the rest of the feed-forward part is open around them
            rest = units.get((layer, False), [])
            open_around += compute * _number([held for held in rest if ".feedforward." in held[0]])
        sent = update * number
        landing = sent + update * _number_of_part(unit, shards) + compute * _largest(unit)
        copied = compute * number + max(sent_before, sent)
        found += [open_around + max(copied, landing), open_around + sent_before + on_its_way]
    return max(found)
