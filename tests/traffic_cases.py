"""Bytes that one rank sends in one step, by axis and operation, beside what a textbook says that it must.

n ranks of the axis, m micro-batches a step on this rank, L layers, t = s * b tokens of a micro-batch before they are
split, h hidden_size; N weights of this rank, P the same with dims cut in n parts rounded up. What each rank sends:

    dp    ZeRO-0   all_reduce 2 (n-1)/n N, once over all copies and shards: n is all ranks of the data
          ZeRO-1   reduce_scatter (n-1)/n P, all_gather (n-1)/n P
          ZeRO-2   reduce_scatter m times: FSDP2 reduces for every micro-batch, and adds up parts
          ZeRO-3   the same, and all_gather 2 m times, for each pass forward and backward
    HSDP           from ZeRO-1 on each rank's part again over r of dp_replicate: all_reduce 2 (r-1)/r P/n
    tp + sp        attention, feed-forward, and each end of the model gather and scatter tokens once forward and once
                   backward: m (2 L + 2) times (n-1)/n t h, twice; the former gather once more backward, as each rank
                   keeps its own tokens only: m 2 L; the loss 3 numbers a token; norms' gradients
    ep             every row that leaves, to an expert elsewhere or back from here, and its gradient: 2 h; counts e/n
                   of int64 to each other rank; gradients of experts as in ZeRO, over edp
    etp            a rank's rows, padded to those of its neighbour with most, gathered and summed, both again backward:
                   4 (n-1) rows h; counts of the experts here to each other rank
    cp, ring       keys and values go round: n-1 times forward, n-1 times backward, and their gradients n times:
                   m L (3n-2) 2 t/n k d, of k key heads of width d; gradients of weights as in ZeRO
    cp, Ulysses    q, k, v and the output forward, their gradients backward: m L 2 (n-1)/n t/n (2 heads + 2 k) d
    pp             an activation t h forward, its gradient backward, at every border between ranks

`LAYOUTS` has the numbers of some layouts; tests hold them equal, benchmarks/layouts.py tells them.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from math import prod
from typing import Any

from collective_calls import Call, bytes_sent, watching
from engine_cases import BATCH, SEQ, Samples, forward_backward, start
from parity_samples import Sample, sample
from torch import Tensor

from meshwright.launcher.build import plan_of
from meshwright.launcher.stages import layers_held, stages_of
from meshwright.model.config import ModelConfig
from meshwright.model.parts import build_model
from meshwright.model.routers.topk import TopKRouter
from meshwright.model.stage import HeldStages
from meshwright.parallel.apply import Plan
from meshwright.parallel.mesh import Mesh, single_process_mesh
from meshwright.parallel.placement import chunk_bounds

Bytes = Counter[tuple[str, str]]
WIDTH = 8  # fp64
# One group may be several axes; it is called by the first of these.
NAMES = ("tp", "cp", "pp", "ep", "etp", "dp_shard", "data", "edp", "dp_replicate", "zero", "dp", "token", "ends")


@dataclass
class Traffic:
    """Adds up what this rank sends."""

    names: dict[str, str]
    sent: Bytes
    away: list[int]
    """Rows that each all-to-all of rows sent to others."""

    def before(self, call: Call) -> None:
        """Count a call."""
        self.sent[self.names[call.name], call.op] += bytes_sent(call)
        if call.rows is not None and call.inputs[0].is_floating_point():
            self.away.append(sum(call.rows[0]) - call.rows[0][call.group.rank()])

    def after(self, call: Call, work: Any) -> None:
        """Nothing is left to count."""

    def waited(self, work: Any) -> None:
        """Nothing is left to count."""


def traffic_of_a_step(mesh: Mesh, drawn: Sample) -> Bytes:
    """Run one step, until the weights are published, and return what this rank sent."""
    run_file = drawn.run_file()
    ways = Samples(context=run_file.parallel.context)
    run = start(mesh, run_file.model, plan_of(run_file), stages=stages_of(run_file), samples=ways)
    names: dict[str, str] = {}
    for name in (*NAMES, *mesh.axes):
        axis = mesh.axes.get(name)
        if axis is not None and axis.group is not None:
            names.setdefault(axis.group.group_name, name)
    traffic = Traffic(names, Counter(), [])
    if mesh.pp.is_split:
        forward_backward(run, 0, drawn.micro_batch)  # torch's stages say hello in their first step: 4 bytes
        run.engine.publish_weights()
    with watching(traffic):
        forward_backward(run, 0, drawn.micro_batch)
        run.engine.publish_weights()
    return Counter({key: sent for key, sent in traffic.sent.items() if sent})


def weights_of(config: ModelConfig, *, experts: bool = False) -> list[tuple[int, ...]]:
    """Return the shapes of a model's parameters, of the routed experts or of all others."""
    named = build_model(config, device="meta").named_parameters()
    return [tuple(parameter.shape) for name, parameter in named if (".experts." in name) == experts]


def numel(shapes: list[tuple[int, ...]], parts: int = 1, index: int = 0) -> int:
    """Return the numbers of one part of each, cut along dim 0 as torch.chunk does: the first is the largest."""
    total = 0
    for rows, *rest in shapes:
        begin, end = chunk_bounds(rows, parts, index)
        total += (end - begin) * prod(rest)
    return total


def dp_bytes(drawn: Sample, n: int, rank: int, replicas: int = 1) -> Bytes:
    """Return what ZeRO sends over n ranks that share state, and over copies of them."""
    run_file = drawn.run_file()
    m = BATCH // (n * replicas) // drawn.micro_batch
    return in_bytes(sums(weights_of(run_file.model), run_file.zero.stage, m, "dp_shard", n, rank % n, replicas))


def sums(
    shapes: list[tuple[int, ...]], stage: int, m: int, axis: str, n: int, index: int = 0, replicas: int = 1
) -> Counter[tuple[str, str]]:
    """Return the numbers that a ZeRO stage sends for these weights, over n ranks that share state and copies of them.

    `index` is the rank's among the n, `m` its micro-batches.
    """
    if stage == 0:
        world = n * replicas
        joined = axis if replicas == 1 else "data"
        return Counter({(joined, "all_reduce"): 2 * (world - 1) * numel(shapes) // world})
    part = numel(shapes, n)
    found = Counter({(axis, "reduce_scatter"): (m if stage >= 2 else 1) * (n - 1) * part})
    found[axis, "all_gather"] = (2 * m if stage == 3 else 1) * (n - 1) * part
    # Buckets are summed with their padding; FSDP2's parts, of which a later rank's are shorter, without.
    held = part if stage == 1 else numel(shapes, n, index)
    found["dp_replicate", "all_reduce"] = 2 * (replicas - 1) * held // replicas
    return found


def tp_bytes(drawn: Sample, n: int) -> Bytes:
    """Return what tensor parallelism with sequence parallelism sends, in a dense model without biases."""
    model = drawn.run_file().model
    m, t, h, layers = BATCH // drawn.micro_batch, SEQ * drawn.micro_batch, model.hidden_size, model.num_layers
    blocks = m * (n - 1) * t * h // n
    moves, again = blocks * (4 * layers + 2), blocks * 2 * layers
    found = Counter({("tp", "all_gather"): moves + again, ("tp", "reduce_scatter"): moves})
    norms = (2 * layers + 1) * h
    found["tp", "all_reduce"] = Fraction(2 * (n - 1) * (3 * m * t + norms), n)
    return in_bytes(found)


def cp_bytes(drawn: Sample, n: int) -> Bytes:
    """Return what context parallelism sends: keys and values, or heads, and the sum of the weights' gradients."""
    run_file = drawn.run_file()
    model = run_file.model
    m, t = BATCH // drawn.micro_batch, SEQ * drawn.micro_batch
    each = m * model.num_layers * t // n * model.head_dim
    found = Counter({("cp", "all_reduce"): Fraction(2 * (n - 1) * numel(weights_of(model)), n)})
    if run_file.parallel.context == "ring":
        found["cp", "send"] = each * 2 * model.num_kv_heads * (3 * n - 2)
    else:
        assert model.num_kv_heads % n == 0, "else key and value heads are repeated"
        found["cp", "all_to_all"] = 2 * (n - 1) * each * 2 * (model.num_heads + model.num_kv_heads) // n
    return in_bytes(found)


def pp_bytes(drawn: Sample, n: int, rank: int) -> Bytes:
    """Return what a rank with one stage sends: activations to the next one, gradients to the one before; ZeRO's sums.

    Ranks count along dp_shard first.
    """
    run_file = drawn.run_file()
    model, shards = run_file.model, drawn.world // n
    rank, index = divmod(rank, shards)
    t, m, borders = SEQ * drawn.micro_batch, BATCH // drawn.micro_batch // shards, (rank < n - 1) + (rank > 0)
    held = HeldStages(layers_held(run_file, rank), stages_of(run_file).count)
    shapes = [tuple(p.shape) for p in build_model(model, device="meta", held=held).parameters()]
    found = sums(shapes, run_file.zero.stage, m, "dp_shard", shards, index)
    found["pp", "send"] = m * t * model.hidden_size * borders
    return in_bytes(found)


def moe_bytes(drawn: Sample, rank: int) -> Bytes:
    """Return what a mixture of experts sends over data-parallel ranks: rows, counts of rows, sums of gradients."""
    run_file = drawn.run_file()
    model, parallel, stage = run_file.model, run_file.parallel, run_file.zero.stage
    assert model.moe is not None
    ep, etp, copies = parallel.ep, parallel.etp, drawn.world // (parallel.ep * parallel.etp)
    m, h, experts = BATCH // drawn.world // drawn.micro_batch, model.hidden_size, model.moe.num_experts // ep
    expert_weights = [(experts, model.moe.expert_hidden_size // etp, h)] * 3 * model.num_layers
    data = {ep: "ep", etp: "etp"}.get(drawn.world, "dp_shard")  # one group may be both axes
    found = sums(weights_of(model), stage, m, data, parallel.dp_shard, replicas=parallel.dp_replicate)
    found += sums(expert_weights, stage, m, "edp", copies)
    for rows in rows_between(drawn):
        leave, come = sum(rows[rank]), sum(others[rank] for others in rows)
        found["ep", "all_to_all"] += 2 * h * (leave + come - 2 * rows[rank][rank]) + (ep - 1) * experts
        neighbours = range(rank // etp * etp, (rank // etp + 1) * etp)
        padded = max(1, *(sum(others[near] for others in rows) for near in neighbours))
        found["etp", "all_gather"] += (etp - 1) * (2 * padded * h + experts)
        found["etp", "reduce_scatter"] += (etp - 1) * 2 * padded * h
    return in_bytes(found)


@cache
def rows_between(drawn: Sample) -> list[list[list[int]]]:
    """Return for each layer and micro-batch the rows from every rank to every other; from one process's choices.

    A rank's number in a block of ep * etp is its place in ep, then in etp; rows stay in a block and a place of etp.
    """
    run_file = drawn.run_file()
    config, ep, etp, world = run_file.model, run_file.parallel.ep, run_file.parallel.etp, drawn.world
    assert config.moe is not None
    chosen: list[Tensor] = []
    run = start(single_process_mesh(), config, Plan())
    for module in run.model.modules():
        if isinstance(module, TopKRouter):
            module.register_forward_hook(lambda _module, _inputs, routing: chosen.append(routing.expert))
    forward_backward(run, 0, 1)
    assert len(chosen) == BATCH * config.num_layers, "every sample by itself, through every layer"
    m, each = BATCH // world // drawn.micro_batch, config.moe.num_experts // ep
    found = [[[0] * world for _ in range(world)] for _ in range(m * config.num_layers)]
    for at, experts in enumerate(chosen):
        number, layer = divmod(at, config.num_layers)
        rank, of_rank = divmod(number, BATCH // world)
        rows = found[of_rank // drawn.micro_batch * config.num_layers + layer][rank]
        for expert in experts.flatten().tolist():
            rows[rank // (ep * etp) * ep * etp + expert // each * etp + rank % etp] += 1
    return found


def in_bytes(numbers: Counter[tuple[str, str]]) -> Bytes:
    """Return bytes for numbers, which may be parts of one where n does not divide them; what is 0 is left out."""
    return Counter({key: int(WIDTH * count) for key, count in numbers.items() if count})


def of_zero(name: str, replicas: int) -> dict[str, tuple[Sample, Callable[[int], Bytes]]]:
    """Return the four stages over two ranks, and over so many copies of them."""
    copies = {"dp_replicate": replicas} if replicas > 1 else {}
    drawn = [sample("dense", **copies, dp_shard=2, zero__stage=stage) for stage in range(4)]
    return {
        f"{name}ZeRO-{stage}": (each, partial(dp_bytes, each, 2, replicas=replicas)) for stage, each in enumerate(drawn)
    }


TP, PP = sample("dense", tp=2, micro_batch=2), sample("dense", pp=2, micro_batch=2)
PP_AND_DP = [sample("dense", pp=2, dp_shard=2, zero__stage=stage, micro_batch=2) for stage in range(4)]
# Experts whole on one rank, and in two copies (edp), whose gradients are summed.
MIXTURES = {
    "ep": sample("moe", dp_shard=2, ep=2),
    "ep, edp 2": sample("moe", dp_shard=4, ep=2),
    "ep, edp 2, ZeRO-1": sample("moe", dp_shard=4, ep=2, zero__stage=1),
    "ep, HSDP": sample("moe", dp_replicate=2, dp_shard=2, ep=2),
    "etp": sample("moe", dp_shard=2, etp=2),
    "etp, edp 2": sample("moe", dp_shard=4, etp=2, micro_batch=2),
    "ep + etp": sample("moe", dp_shard=4, ep=2, etp=2),
}
RING, ULYSSES = sample("dense", cp=2, micro_batch=2), sample("dense", cp=2, context="ulysses", micro_batch=2)
# By name: a layout, and what each of its ranks sends.
LAYOUTS: dict[str, tuple[Sample, Callable[[int], Bytes]]] = {
    **of_zero("", 1),
    **of_zero("HSDP, ", 2),
    "tp + sp": (TP, lambda rank: tp_bytes(TP, 2)),
    "pp": (PP, partial(pp_bytes, PP, 2)),
    **{f"pp, ZeRO-{stage}": (drawn, partial(pp_bytes, drawn, 2)) for stage, drawn in enumerate(PP_AND_DP) if stage},
    "cp, ring": (RING, lambda rank: cp_bytes(RING, 2)),
    "cp, Ulysses": (ULYSSES, lambda rank: cp_bytes(ULYSSES, 2)),
    **{name: (drawn, partial(moe_bytes, drawn)) for name, drawn in MIXTURES.items()},
}


def over(drawn: Sample, n: int, formula: Callable[..., Bytes]) -> tuple[Sample, Callable[[int], Bytes]]:
    """Return a layout of n ranks along one axis, and what each of them sends."""
    return drawn, partial(formula, drawn, n)


# Three or four ranks along one axis: what two cannot tell, such as n - 1 from 1, or a neighbour from all others.
LONGER: dict[str, tuple[Sample, Callable[[int], Bytes]]] = {
    "tp 3": over(sample("dense-by-three", tp=3, micro_batch=4), 3, lambda drawn, n, _: tp_bytes(drawn, n)),
    "cp 3, ring": over(sample("dense-by-three", cp=3, micro_batch=4), 3, lambda drawn, n, _: cp_bytes(drawn, n)),
    "cp 3, Ulysses": over(
        sample("dense-by-three", cp=3, context="ulysses", micro_batch=4), 3, lambda drawn, n, _: cp_bytes(drawn, n)
    ),
    "cp 6, ring": over(sample("dense", cp=6, micro_batch=4), 6, lambda drawn, n, _: cp_bytes(drawn, n)),
    **{
        f"dp 4, ZeRO-{stage}": over(sample("dense", dp_shard=4, zero__stage=stage, micro_batch=2), 4, dp_bytes)
        for stage in range(4)
    },
    "pp 4": over(sample("dense", pp=4, micro_batch=2), 4, pp_bytes),
    **{
        f"{axis} 4": (drawn, partial(moe_bytes, drawn))
        for axis in ("ep", "etp")
        for drawn in (sample("moe-by-four", dp_shard=4, **{axis: 4}),)
    },
}
