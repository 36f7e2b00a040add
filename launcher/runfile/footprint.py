"""What a rank holds, in bytes: weights, masters, gradients at most, and moments under each ZeRO stage.

    N weights over d ranks that shard state; c bytes in the type computed with, m in the type updated in (at least fp32)

    stage   weights   masters             gradients     moments
    0       c*N       m*N if c < m        m*N           2*m*N
    1       c*N       m*N/d if c < m      m*N + m*N/d   2*m*N/d      sums land beside what is sent, let go then
    2       c*N       m*N/d               m*N/d         2*m*N/d      the weights are gathered for each pass
    3       -         m*N/d               m*N/d         2*m*N/d      one layer at a time is gathered, not counted

Dense weights have d = dp_shard * cp, and N is what tp leaves of them: matrices are cut, key and value heads as far as
there are heads, a vocabulary in equal rows with padding; norms and routers are whole. Routed experts are cut by ep and
etp, and d = edp. With d = 1 stages 1 to 3 are stage 0. Dims that do not divide by d are cut like torch.chunk: the first
ranks hold up to a row more of each than these averages say. With a pipeline N are the weights of a rank's stages, and
what the rank with most holds is returned. What a micro-batch keeps for its backward is counted beside it; the layer
that is gathered, send buffers and the library's own memory come on top.

Muon has one moment where AdamW has two: of what it updates m*N and m*N/d.
"""

from collections.abc import Iterator, Mapping
from math import prod
from typing import NamedTuple

from meshwright.kernels.limits import USUAL
from meshwright.launcher.runfile.optimizer_rules import settings_of
from meshwright.launcher.runfile.tables import RunFile
from meshwright.launcher.stages import layers_held, stages_of
from meshwright.model.activations import ActivationBytes, Degrees, Held, Types, activation_bytes
from meshwright.model.shapes import Weight, embedding_weights, head_weights, layer_weights

COMPUTE_BYTES = {"fp32": 4, "bf16_autocast": 4, "bf16": 2, "fp64": 8}
UPDATE_BYTES = {"fp32": 4, "bf16_autocast": 4, "bf16": 4, "fp64": 8}


class StateBytes(NamedTuple):
    """Bytes on one rank, by what they hold."""

    weights: float
    masters: float
    gradients: float
    moments: float

    @property
    def total(self) -> float:
        """Return the sum."""
        return sum(self)


def state_bytes(run_file: RunFile, world_size: int) -> StateBytes:
    """Return what one rank of `world_size` holds, the one that holds most; the run file must have passed its checks.

    With `model.vocab_size` = 0 the embedding is not counted: nobody knows its size yet.
    """
    of_ranks = [_state_of(run_file, world_size, pp_rank) for pp_rank in range(run_file.parallel.pp)]
    return max(of_ranks, key=lambda state: state.total)


def _state_of(run_file: RunFile, world_size: int, pp_rank: int) -> StateBytes:
    parallel, stage, precision = run_file.parallel, run_file.zero.stage, run_file.train.precision
    held = held_weights(run_file, pp_rank)
    parts = [
        _bytes_of(held.dense, held.dense_of_muon, parallel.dp_shard_in(world_size) * parallel.cp, stage, precision),
        _bytes_of(held.experts, held.experts_of_muon, parallel.edp_in(world_size), stage, precision),
    ]
    return StateBytes(*(sum(column) for column in zip(*parts, strict=True)))


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
    if 0 in held or (last in held and model.tie_embeddings):
        yield from _cut(run_file, "", embedding_weights(model))
    for layers in held.values():
        for number in layers:
            yield from _cut(run_file, f"layers.{number}.", layer_weights(model, kinds[number]))
    if last in held:
        yield from _cut(run_file, "", head_weights(model))


def _cut(run_file: RunFile, prefix: str, found: Mapping[str, Weight]) -> Iterator[HeldWeight]:
    parallel, kv_heads = run_file.parallel, run_file.model.num_kv_heads
    parts = {
        "none": 1,
        "tp": parallel.tp,
        "kv_heads": min(parallel.tp, kv_heads),
        "vocabulary": parallel.tp,
        "experts": parallel.ep * parallel.etp,
        "expert_outputs": parallel.ep,
    }
    for name, weight in found.items():
        if weight.cut == "vocabulary":
            number = -(-weight.shape[0] // parts[weight.cut]) * prod(weight.shape[1:])
        else:
            number = weight.number // parts[weight.cut]
        yield prefix + name, weight, number


def micro_batch_bytes(run_file: RunFile, world_size: int) -> ActivationBytes:
    """Return what one micro-batch keeps on a rank; at most that where recompute is neither "none" nor "full".

    With a pipeline it is that of all stages of the rank that keeps most.
    """
    return max(
        (_activations_of(run_file, world_size, rank) for rank in range(run_file.parallel.pp)),
        key=lambda found: found.total,
    )


def _activations_of(run_file: RunFile, world_size: int, pp_rank: int) -> ActivationBytes:
    parallel, precision, recompute = run_file.parallel, run_file.train.precision, run_file.recompute
    types = {
        "fp32": Types(4, 4),
        "bf16_autocast": Types(4, 2, is_cast=True),
        "bf16": Types(2, 2),
        "fp64": Types(8, 8),
    }[precision]
    every = recompute.every if recompute.mode == "full" else 0
    again = frozenset(range(0, run_file.model.num_layers, every)) if every else frozenset()
    samples = run_file.train.global_batch_size // parallel.dp_in(world_size)
    tokens = min(run_file.train.micro_batch_size, samples) * run_file.data.seq_len
    spread = Degrees(parallel.cp, parallel.tp, parallel.etp, parallel.context)
    # Who asks may not be the machine that trains: where the run file does not say, the larger.
    logits = USUAL.logits(run_file.run.device)
    held, last = layers_held(run_file, pp_rank), stages_of(run_file).count - 1
    layers = frozenset(number for stage in held.values() for number in stage)
    here = Held(layers, layers & again, has_head=last in held)
    return activation_bytes(run_file.model, tokens, spread, types, here, logits=logits)


def _bytes_of(number: int, muon: int, shards: int, stage: int, precision: str) -> StateBytes:
    """Return the bytes of so many weights, some of them Muon's, whose state is cut over `shards` ranks."""
    compute, update = float(COMPUTE_BYTES[precision]), float(UPDATE_BYTES[precision])
    stage = stage if shards > 1 else 0
    part = number / shards
    has_masters = compute < update or stage >= 2
    return StateBytes(
        weights=0.0 if stage == 3 else compute * number,
        masters=update * (part if stage >= 1 else number) if has_masters else 0.0,
        gradients=update * ((0 if stage >= 2 else number) + (0 if stage == 0 else part)),
        moments=update * (2 * number - muon) / (shards if stage >= 1 else 1),
    )
