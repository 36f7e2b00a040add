"""Muon: one step is that of torch.optim.Muon, and every layout makes the same steps as one process."""

from functools import cache

import engine_cases
import pytest
import torch
from engine_cases import dense_config, moe_config
from rank_pool import run_mesh
from torch import Tensor, nn

from meshwright.launcher.runfile.tables import OptimizerConfig, OptimizerGroup
from meshwright.launcher.training.muon import orthogonal
from meshwright.launcher.training.optimizer import Optimizer
from meshwright.parallel.apply import Plan
from meshwright.parallel.collectives import all_reduce
from meshwright.parallel.grad_norm import clip_gradients, gradient_norm
from meshwright.parallel.mesh import Mesh, Sizes, single_process_mesh
from meshwright.parallel.pipeline.orders import Stages
from meshwright.parallel.placement import Placement
from meshwright.parallel.zero.part import Part

SHAPES = {
    "layers.0.mixer.part.q.weight": (12, 7),
    "layers.0.mixer.part.output.weight": (7, 12),
    "layers.0.feedforward.part.experts.gate": (3, 5, 7),
}


def gradients(step: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=made, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()}


def updated_by_us(config: OptimizerConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    parts = {}
    for name, tensor in gradients(0, dtype).items():
        shape = tuple(tensor.shape)
        parts[name] = Part(
            nn.Parameter(tensor), Placement(), shape, (0,) * len(shape), is_zero_part=False, split_axes=()
        )
    optimizer = Optimizer(parts, config, single_process_mesh())
    for step in (1, 2, 3):
        for name, gradient in gradients(step, dtype).items():
            parts[name].parameter.grad = gradient
        optimizer.step(0.01 * step)
    return {name: part.parameter.detach() for name, part in parts.items()}


def updated_by_torch(config: OptimizerConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every matrix, and every one of a stack, a parameter of torch's Muon with the AdamW-sized updates of Moonlight."""
    matrices = {name: [nn.Parameter(m) for m in t.view(-1, *t.shape[-2:])] for name, t in gradients(0, dtype).items()}
    muon = torch.optim.Muon(
        [one for several in matrices.values() for one in several],
        weight_decay=config.weight_decay,
        momentum=config.muon_momentum,
        nesterov=config.muon_nesterov,
        ns_steps=config.muon_steps,
        adjust_lr_fn="match_rms_adamw",
    )
    for step in (1, 2, 3):
        for name, gradient in gradients(step, dtype).items():
            for one, of_one in zip(matrices[name], gradient.view(-1, *gradient.shape[-2:]), strict=True):
                one.grad = of_one.clone()
        muon.param_groups[0]["lr"] = 0.01 * step
        muon.step()
    return {name: torch.stack([m.detach() for m in ms]).view(SHAPES[name]) for name, ms in matrices.items()}


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig(kind="muon"),
        OptimizerConfig(kind="muon", muon_momentum=0.8, muon_nesterov=False, muon_steps=3, weight_decay=0.5),
    ],
)
def test_steps_are_those_of_torch(config: OptimizerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = updated_by_us(config, torch.float64)
    # torch's Muon rounds to bf16 wherever it runs; without that its steps are ours to the last digits.
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)
    for name, expected in updated_by_torch(config, torch.float64).items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-10, atol=1e-11)


def test_steps_in_fp32_are_those_of_torch_as_far_as_bf16_can_tell() -> None:
    config = OptimizerConfig(kind="muon")
    ours, theirs = updated_by_us(config, torch.float32), updated_by_torch(config, torch.float32)
    for name, expected in theirs.items():
        moved = expected - gradients(0, torch.float32)[name]
        assert (ours[name] - expected).norm() < 0.03 * moved.norm()
        assert moved.norm() > 0.03


def test_large_stacks_are_made_orthogonal_in_several_products() -> None:
    stack = [
        *list(gradients(4)["layers.0.feedforward.part.experts.gate"]),
        gradients(4)["layers.0.mixer.part.q.weight"],
    ]
    at_once = orthogonal(stack, 5)
    by_two = orthogonal(stack, 5, at_once=70)  # matrices of [5, 7]
    for one, other in zip(by_two, at_once, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


LATENT = {"kv_lora_rank": 10, "q_lora_rank": 14, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8}
CONFIGS = {
    "dense": dense_config(num_layers=1, bias=("q", "ffn")),
    "moe": moe_config(num_layers=2, bias=("ffn",)),
    "latent": dense_config(num_layers=1, pattern="+-", num_kv_heads=4, latent=LATENT, multi_token={}),
    "switch_head": dense_config(num_layers=1, pattern="H-", num_kv_heads=4, switch_head={"num_experts": 4, "top_k": 2}),
}
MUON = OptimizerConfig(
    kind="muon",
    adamw_learning_rate_factor=0.5,
    groups=(
        OptimizerGroup(match="*.v.weight", kind="adamw"),
        OptimizerGroup(match="*.router.weight", kind="muon"),
        OptimizerGroup(match="output.weight", kind="muon", weight_decay=0.0),
    ),
)
# A layout is one line: sizes, model, ZeRO stage.
LAYOUTS = [
    (Sizes(dp_shard=2), "dense", 0),
    (Sizes(dp_shard=2), "dense", 1),
    (Sizes(dp_shard=2, ep=2), "moe", 1),
    (Sizes(dp_shard=4, ep=2), "moe", 1),
    (Sizes(dp_shard=2), "moe", 3),
    (Sizes(dp_shard=2, tp=2), "dense", 1),
    (Sizes(cp=2), "dense", 1),
    (Sizes(tp=2), "latent", 0),
    (Sizes(dp_shard=2, tp=2), "switch_head", 1),
]
MORE_LAYOUTS = [
    (Sizes(dp_shard=2), "dense", 2),
    (Sizes(dp_replicate=2, dp_shard=2), "dense", 1),
    (Sizes(dp_shard=2, ep=2), "moe", 0),
    (Sizes(dp_shard=2, ep=2), "moe", 3),
    (Sizes(dp_shard=4), "moe", 1),
    (Sizes(dp_shard=4, ep=2), "moe", 0),
    (Sizes(dp_shard=4, ep=2), "moe", 3),
    (Sizes(tp=2), "dense", 0),
    (Sizes(tp=4), "dense", 0),
    (Sizes(tp=2, etp=2), "moe", 0),
    (Sizes(dp_shard=2, tp=2, etp=2), "moe", 1),
    (Sizes(dp_shard=2, tp=2, ep=2, etp=2), "moe", 3),
    (Sizes(dp_replicate=2, dp_shard=2), "moe", 3),
    (Sizes(pp=2), "moe", 0),
    (Sizes(pp=2, dp_shard=2), "moe", 1),
    (Sizes(pp=2, cp=2, ep=2), "moe", 3),
    (Sizes(dp_shard=2, cp=2, ep=2), "moe", 1),
    (Sizes(dp_shard=2, tp=2), "latent", 1),
    (Sizes(dp_shard=2), "latent", 3),
    (Sizes(dp_shard=2), "switch_head", 3),
    (Sizes(tp=4), "switch_head", 0),
]


def train(mesh: Mesh, name: str, stage: int) -> dict[str, Tensor]:
    """Return weights and state after three steps, gathered."""
    stages = Stages("gpipe", mesh.pp.size)
    run = engine_cases.start(mesh, CONFIGS[name], Plan(stage=stage), stages=stages)
    parts = run.engine.parts
    optimizer = Optimizer(parts, MUON, mesh)
    for step in range(3):
        engine_cases.forward_backward(run, step, 1)
        clip_gradients(parts.values(), gradient_norm(parts.values(), mesh.pp), 0.1)
        optimizer.step(0.01)
        run.engine.publish_weights()
    found = {name: engine_cases.gather(part, part.parameter) for name, part in parts.items()}
    for name, part in parts.items():
        found |= {f"{m}.{name}": engine_cases.gather(part, t) for m, t in optimizer.moments(name).items()}
    return engine_cases.of_all_stages(run, found)


@cache
def definition(name: str) -> dict[str, Tensor]:
    return train(single_process_mesh(), name, 0)


def assert_same(sizes: Sizes, name: str, stage: int) -> None:
    expected = definition(name)
    for found in run_mesh(sizes, train, name, stage):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert (found[key] - value).abs().max() <= 1e-9 * value.abs().max(), key


@pytest.mark.parametrize(("sizes", "name", "stage"), LAYOUTS)
def test_a_layout_makes_the_steps_of_one_process(sizes: Sizes, name: str, stage: int) -> None:
    assert_same(sizes, name, stage)


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "name", "stage"), MORE_LAYOUTS)
def test_every_other_layout_makes_the_steps_of_one_process(sizes: Sizes, name: str, stage: int) -> None:
    assert_same(sizes, name, stage)


def work_of(mesh: Mesh, name: str, stage: int) -> tuple[list[tuple[str, int]], int]:
    """Return on which matrices this rank works, and how many it holds anything of."""
    run = engine_cases.start(mesh, CONFIGS[name], Plan(stage=stage))
    batches = Optimizer(run.engine.parts, OptimizerConfig(kind="muon"), mesh)._muon._batches
    return [tuple(one) for b in batches for one in b.work.mine], sum(len(b.matrices) for b in batches)


@pytest.mark.parametrize("stage", [0, 1])
def test_each_matrix_is_worked_on_by_one_rank(stage: int) -> None:
    found = run_mesh(Sizes(dp_shard=2), work_of, "dense", stage)
    shares = [set(mine) for mine, _ in found]
    assert shares[0] & shares[1] == set()
    assert len(shares[0] | shares[1]) == found[0][1] == 7
    assert min(len(share) for share in shares) >= 2


def sent_by_the_step(mesh: Mesh, stage: int) -> int:
    """Return how many ranks called a collective for the experts: their stacks are cut between whole matrices."""
    run = engine_cases.start(mesh, CONFIGS["moe"], Plan(stage=stage))
    muon = Optimizer(run.engine.parts, OptimizerConfig(kind="muon"), mesh)._muon
    of_experts = [b for b in muon._batches if "experts" in b.matrices[0].name]
    count = torch.tensor([float(sum(len(b.work._exchanges) for b in of_experts))])
    all_reduce(count, mesh.world)
    return int(count)


def test_a_rank_that_holds_whole_experts_gathers_nothing() -> None:
    assert run_mesh(Sizes(dp_shard=4, ep=2), sent_by_the_step, 1)[0] == 0
    assert run_mesh(Sizes(dp_shard=4, ep=2), sent_by_the_step, 0)[0] == 4  # everyone has its copy: the work is shared
