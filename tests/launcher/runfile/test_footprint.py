"""Bytes of state on a rank, counted by hand for each ZeRO stage, and those of a micro-batch."""

import pytest
import torch

from meshwright.launcher.build import recompute_of
from meshwright.launcher.runfile.footprint import (
    StateBytes,
    activations_held,
    held_weights,
    micro_batch_bytes,
    state_bytes,
)
from meshwright.launcher.runfile.optimizer_rules import settings_of
from meshwright.launcher.runfile.read import examine
from meshwright.launcher.runfile.tables import RunFile
from meshwright.launcher.stages import layers_held, stages_of
from meshwright.model.counts.activations import (
    ActivationBytes,
    gathered_bytes,
    head_bytes,
    head_matrix_bytes,
    layer_bytes,
)
from meshwright.model.counts.costs import parameter_count
from meshwright.model.counts.shapes import parameter_shapes, weights
from meshwright.model.kinds.kind import Degrees, Types
from meshwright.model.kinds.table import KINDS
from meshwright.model.parts import build_model
from meshwright.model.stage import HeldStages
from meshwright.parallel.mesh import Axis, Mesh, Sizes, single_process_mesh
from meshwright.parallel.recompute.policy import keep_less
from meshwright.parallel.tally import Tally


def run_file(*overrides: str) -> RunFile:
    tables = {
        "run": {"name": "x"},
        "model": {"preset": "moe-tiny", "vocab_size": 320},
        "data": {"store": "s", "seq_len": 64},
        "train": {"steps": 100, "global_batch_size": 24},
        "learning_rate": {"peak": 1e-3},
    }
    made, problems = examine(tables, overrides)
    assert made is not None, problems
    return made


def kept_by(*overrides: str) -> ActivationBytes:
    """Return what a micro-batch keeps on the fewest ranks that these axes take."""
    run = run_file(*overrides)
    return micro_batch_bytes(run, run.parallel.pp * run.parallel.cp * run.parallel.tp)


ALL = parameter_count(run_file().model)
EXPERTS = sum(weight.number for weight in weights(run_file().model).values() if weight.is_of_experts)
# On 8 ranks with ep = 2: a rank holds half of the experts, shared with the 3 others of its edp; the rest with 7.
HELD = ALL - EXPERTS + EXPERTS / 2
PART = (ALL - EXPERTS) / 8 + EXPERTS / 2 / 4


SIZES = {
    name: weight.number // (2 if weight.is_of_experts else 1) for name, weight in weights(run_file().model).items()
}
LARGEST = max(SIZES.values())


def of(*marks: str) -> int:
    """Return how many numbers a rank holds of the weights whose names have all of these in them."""
    return sum(number for name, number in SIZES.items() if all(mark in name for mark in marks))


# What FSDP2 reduces: a layer's experts, while the output's gradients are open, and those of the experts beside them.
OPEN = of("output.weight") - of("mixer", "output.weight") + of("final_norm") + of("layers.0.feedforward")
UNIT = of("layers.0.feedforward.part.experts")


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (0, StateBytes(4 * HELD, 0, 4 * HELD + 4 * LARGEST, 8 * HELD)),
        (1, StateBytes(4 * HELD, 0, 4 * HELD + 4 * PART + 4 * LARGEST, 8 * PART)),
        (2, StateBytes(4 * HELD, 4 * PART, 4 * PART + 4 * OPEN + 4 * UNIT, 8 * PART)),
        (3, StateBytes(0, 4 * PART, 4 * PART + 4 * OPEN + 4 * UNIT, 8 * PART)),
    ],
)
def test_each_stage_shares_more(stage: int, expected: StateBytes) -> None:
    assert state_bytes(run_file(f"zero.stage={stage}", "parallel.ep=2"), 8) == pytest.approx(expected)


def test_weights_in_bf16_have_masters() -> None:
    whole = max(weight.number for weight in weights(run_file().model).values())
    assert state_bytes(run_file("train.precision=bf16"), 1) == StateBytes(
        2 * ALL, 4 * ALL, 4 * ALL + 2 * whole, 8 * ALL
    )
    assert state_bytes(run_file("train.precision=fp64"), 1) == StateBytes(8 * ALL, 0, 8 * ALL + 8 * whole, 16 * ALL)


LLAMA = ("model.preset=llama3-8b", "model.vocab_size=128256", "parallel.pp=4", "train.global_batch_size=64")


def gradients_of(schedule: str, stage: int, *more: str) -> float:
    run = run_file(*LLAMA, f"pipeline.schedule={schedule}", f"zero.stage={stage}", *more)
    return state_bytes(run, 16).gradients


@pytest.mark.parametrize("apart", ["zbv", "dualpipev", "interleaved_zero_bubble"])
def test_gradients_count_by_schedule(apart: str) -> None:
    """Backwards taken apart add all of a rank's weights under ZeRO-0, and a bucket under ZeRO-1."""
    run = run_file(*LLAMA, f"pipeline.schedule={apart}")
    embedding = 128256 * 4096
    ranks = [4.0 * sum(held_weights(run, rank)[:2]) for rank in range(4)]
    # The rank that holds most has the output, and where the pipeline is a V the embedding too.
    most = max(ranks)
    assert gradients_of(apart, 0) == 2 * most + 4 * embedding
    assert gradients_of(apart, 1) == 1.25 * most + 32 * 2**20 + 4 * embedding
    # Of the largest unit one gradient, the sent ones and a quarter of them: the output with its norm, or the embedding.
    norm = 0 if apart == "interleaved_zero_bubble" else 4096
    assert gradients_of(apart, 2) == most + 4 * embedding + (embedding + norm)


def test_zero_saves_under_a_pipeline_what_it_saves_without_one() -> None:
    """Where backwards are whole, units are gathered and reduced one at a time."""
    for changes in ((), ("parallel.pp=1",)):
        run = run_file(*LLAMA, *changes)
        numbers = max(sum(held_weights(run, rank)[:2]) for rank in range(run.parallel.pp))
        second, third = (state_bytes(run_file(*LLAMA, *changes, f"zero.stage={stage}"), 16) for stage in (2, 3))
        assert (second.weights, third.weights) == (4.0 * numbers, 0)
        assert second.gradients == third.gradients < 4 * numbers


def test_one_rank_has_nobody_to_share_with() -> None:
    assert state_bytes(run_file("zero.stage=3"), 1) == state_bytes(run_file(), 1)


def test_experts_without_a_copy_are_held_whole() -> None:
    """With ep = world size each expert lives on one rank: stage 3 shards all else."""
    dense = (ALL - EXPERTS) / 4
    held = EXPERTS / 4
    found = state_bytes(run_file("zero.stage=3", "parallel.ep=4"), 4)
    assert found[:2] == pytest.approx((4 * held, 4 * dense))
    assert found.moments == pytest.approx(8 * (dense + held))
    # Whole for the experts, parts for all else, and what is reduced at a time: the embedding and the output here.
    around = of("embedding") + of("output.weight") - of("mixer", "output.weight") + of("final_norm")
    assert found.gradients == pytest.approx(4 * (dense + held) + 8 * around)


@pytest.mark.parametrize(
    ("overrides", "sizes"),
    [
        (["parallel.tp=2"], Sizes(tp=2)),
        (["parallel.tp=4", "model.vocab_size=325"], Sizes(tp=4)),
        (
            ["parallel.tp=4", "parallel.ep=2", "parallel.etp=2", "model.moe.num_shared_experts=2"],
            Sizes(tp=4, ep=2, etp=2),
        ),
        (["parallel.tp=2", 'model.bias=["q","k","v","output","ffn"]', "model.qk_norm=true"], Sizes(tp=2)),
        (["parallel.etp=4", 'model.bias=["ffn"]', "model.tie_embeddings=true"], Sizes(dp_shard=4, etp=4)),
    ],
)
def test_the_weights_of_a_rank_are_those_that_a_model_holds(overrides: list[str], sizes: Sizes) -> None:
    # The axes without groups: a model on the meta device communicates nothing.
    names = single_process_mesh().axes
    axes = {name: Axis(name, getattr(sizes, name, 1)) for name in names}
    axes |= {f"tp/{copies}": Axis(f"tp/{copies}", copies) for copies in (2, 4)}
    config = run_file(*overrides).model
    model = build_model(config, mesh=Mesh(sizes, axes, rank=0), device="meta")
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert held_weights(run_file(*overrides))[:2] == (sum(p.numel() for p in model.parameters()) - experts, experts)
    muon = run_file(*overrides, "optimizer.kind=muon", 'optimizer.groups=[{match = "*.router.weight", kind = "muon"}]')
    counts = {False: 0, True: 0}
    for name, shape in parameter_shapes(muon.model).items():
        if settings_of(name, shape, muon.optimizer).kind == "muon":
            counts[".experts." in name] += model.get_parameter(name).numel()
    assert held_weights(muon)[2:] == (counts[False], counts[True])


def test_muon_has_one_moment_of_what_it_updates() -> None:
    """The same bytes as a run of one process holds, and by hand where ranks share."""
    config = run_file("optimizer.kind=muon").model
    h, d, layers = config.hidden_size, config.head_dim, config.num_layers
    assert config.moe is not None
    attention = 2 * h * d * (config.num_heads + config.num_kv_heads)
    shared = 3 * h * config.moe.shared_hidden_size
    muon = layers * (attention + shared)
    assert state_bytes(run_file("optimizer.kind=muon"), 1).moments == 4 * (2 * ALL - muon - EXPERTS)
    held = 2 * (ALL - EXPERTS) - muon + EXPERTS / 2
    assert state_bytes(run_file("optimizer.kind=muon", "parallel.ep=2"), 8).moments == pytest.approx(4 * held)
    part = (2 * (ALL - EXPERTS) - muon) / 8 + EXPERTS / 2 / 4
    cut = state_bytes(run_file("optimizer.kind=muon", "parallel.ep=2", "zero.stage=1"), 8)
    assert cut.moments == pytest.approx(4 * part)
    without_experts = 'optimizer.groups=[{match = "*.experts.*", kind = "adamw"}]'
    found = state_bytes(run_file("optimizer.kind=muon", without_experts), 1).moments
    assert found == 4 * (2 * ALL - muon)


LONG = ("parallel.cp=4", "parallel.tp=2", "data.seq_len=1024", "train.micro_batch_size=3", "train.precision=bf16")


def test_a_micro_batch_of_a_rank_is_its_part_of_the_tokens() -> None:
    """Of two layers the first is recomputed: it keeps its input, hidden_size / tp numbers of two bytes a token."""
    tokens, spread, types = 3 * 1024, Degrees(cp=4, tp=2), Types(2, 2)
    model = run_file().model
    layer = layer_bytes(model, model.layers[0], spread, types) * tokens / 4
    head = head_bytes(model, spread, types) * tokens / 4 + head_matrix_bytes(model, spread, types)
    assert kept_by(*LONG).kept == pytest.approx(2 * layer + head)
    some = kept_by(*LONG, "recompute.mode=full", "recompute.every=2")
    assert some.kept == pytest.approx(64 / 2 * 2 * tokens / 4 + layer + head)
    working = (gathered_bytes(model, spread, 2 + 2) + KINDS["attention"].at_work(model, spread, types)) * tokens / 4
    assert some.at_work == pytest.approx(working + layer)


def test_no_more_is_counted_than_a_rank_has_samples() -> None:
    many = run_file("train.global_batch_size=16", "train.micro_batch_size=999")
    for ranks, samples in ((1, 16), (8, 2)):
        exactly = run_file("train.global_batch_size=16", f"train.micro_batch_size={samples}")
        assert micro_batch_bytes(many, ranks) == micro_batch_bytes(exactly, ranks)


def test_ulysses_is_counted_as_such_and_a_cpu_takes_smaller_chunks_of_logits() -> None:
    """Of 40,960 tokens and 320 logits each a CPU takes 2^23 at a time, and a GPU all; in fp32."""
    model, spread, types = run_file().model, Degrees(cp=2, context="ulysses"), Types()
    layer = layer_bytes(model, model.layers[0], spread, types) * 64 / 2
    head = head_bytes(model, spread, types) * 64 / 2 + head_matrix_bytes(model, spread, types)
    found = kept_by("parallel.cp=2", "parallel.context=ulysses", "train.micro_batch_size=1")
    assert found.kept == pytest.approx(2 * layer + head)
    many = ("train.global_batch_size=640", "train.micro_batch_size=640")
    for device, tokens in (("cpu", 2**23 // 320), ("cuda", 40_960), ("auto", 40_960)):
        assert kept_by(*many, f"run.device={device}").at_work == tokens * 320 * 4


def test_the_stage_that_keeps_most_counts() -> None:
    whole, halves = (kept_by(*LONG, *more) for more in ((), ("parallel.pp=2",)))
    model, spread = run_file().model, Degrees(cp=4, tp=2)
    first_layer = layer_bytes(model, model.layers[0], spread, Types(2, 2)) * 3 * 1024 / 4
    assert halves.kept == pytest.approx(whole.kept - first_layer)


@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "zbv"])
def test_the_weights_of_the_stages_of_a_rank_are_those_that_it_holds(schedule: str, tied: str) -> None:
    overrides = ["parallel.pp=2", f"pipeline.schedule={schedule}", f"model.tie_embeddings={tied}"]
    run = run_file(*overrides, "model.num_layers=4")
    names = single_process_mesh().axes
    for rank in range(2):
        mesh = Mesh(Sizes(pp=2), {name: Axis(name) for name in names}, rank)
        held = HeldStages(layers_held(run, rank), stages_of(run).count)
        model = build_model(run.model, mesh=mesh, device="meta", held=held)
        experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
        assert held_weights(run, rank)[:2] == (sum(p.numel() for p in model.parameters()) - experts, experts)
    largest = max(sum(held_weights(run, rank)[:2]) for rank in range(2))
    assert state_bytes(run, 2).weights == 4 * largest


RECOMPUTED = {
    "every layer": ["model.num_layers=4"],
    "every third of seven": ["model.num_layers=7", "recompute.every=3"],
    "layers used twice": ["model.num_layers=6", "model.distinct_layers=3", "recompute.every=2"],
    "further tokens": ["model.num_layers=3", "model.multi_token={depth=2}", "recompute.every=2"],
    "both": ["model.num_layers=4", "model.distinct_layers=2", "model.multi_token={depth=2}", "recompute.every=4"],
    "a pipeline": ["model.num_layers=7", "parallel.pp=2", "model.multi_token={depth=1}", "recompute.every=2"],
    "in a V": ["model.num_layers=10", "parallel.pp=2", "pipeline.schedule=zbv", "recompute.every=2"],
    "in turns": ["model.num_layers=6", "parallel.pp=2", "pipeline.schedule=interleaved_1f1b", "recompute.every=3"],
}


@pytest.mark.parametrize("case", RECOMPUTED)
def test_the_layers_that_count_as_recomputed_are_those_that_are(case: str) -> None:
    run = run_file("recompute.mode=full", *RECOMPUTED[case])
    model, some = run.model, 0
    for rank in range(run.parallel.pp):
        mesh = Mesh(Sizes(pp=run.parallel.pp), {name: Axis(name) for name in single_process_mesh().axes}, rank)
        held = HeldStages(layers_held(run, rank), stages_of(run).count)
        built = build_model(model, mesh=mesh, device="meta", held=held)
        keep_less(built.held_layers, Tally({}), recompute_of(run.recompute), torch.device("cpu"))
        numbers = [int(number) for number in built.layers]
        numbers += range(model.num_layers, model.num_layers + len(built.multi_token))
        again = {at for at, layer in zip(numbers, built.held_layers, strict=True) if "forward" in vars(layer)}
        found = activations_held(run, rank)
        laps = range(model.num_layers // model.held_layers)
        uses = {at + lap * model.held_layers for at in numbers if at < model.num_layers for lap in laps}
        assert found.layers == uses
        assert {at if at >= model.num_layers else at % model.held_layers for at in found.recomputed} == again
        assert len(found.recomputed) == sum(len(laps) if at < model.num_layers else 1 for at in again)
        assert (found.has_embedding, found.has_head) == (held.has_first, held.has_last)
        some += len(again)
    assert some > 0
