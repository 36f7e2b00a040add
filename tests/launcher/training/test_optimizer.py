"""AdamW's settings by parameter group are those of torch's AdamW with groups made by hand."""

from pathlib import Path

import pytest
import torch
from engine_cases import dense_config
from engine_cases import start as start_engine
from tiny_run import build, numbers, start
from torch import nn

from meshwright.launcher.runfile.messages import ConfigError
from meshwright.launcher.runfile.tables import OptimizerConfig, OptimizerGroup
from meshwright.launcher.training.optimizer import Optimizer
from meshwright.model.counts.costs import parameter_count
from meshwright.parallel.apply import Plan
from meshwright.parallel.grad_norm import gradient_norm
from meshwright.parallel.mesh import single_process_mesh
from meshwright.parallel.placement import Placement
from meshwright.parallel.zero.part import Part

SHAPES = {
    "embedding.weight": (6, 4),
    "layers.0.mixer.norm.weight": (4,),
    "layers.0.feedforward.part.router.weight": (3, 4),
    "layers.0.feedforward.part.experts.up_bias": (3, 5),
    "layers.1.feedforward.part.router.weight": (3, 4),
    "output.weight": (6, 4),
}


def values(seed: int) -> dict[str, torch.Tensor]:
    """Return a tensor for each name, the same ones for the same seed."""
    made = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=made) for name, shape in SHAPES.items()}


def part_of(tensor: torch.Tensor) -> Part:
    parameter = nn.Parameter(tensor, requires_grad=False)
    shape = tuple(tensor.shape)
    return Part(parameter, Placement(), shape, (0,) * len(shape), is_zero_part=False, split_axes=())


def updated_by_us(config: OptimizerConfig) -> dict[str, torch.Tensor]:
    """Return the parameters after three steps of ours."""
    parts = {name: part_of(tensor) for name, tensor in values(0).items()}
    optimizer = Optimizer(parts, config, single_process_mesh())
    for step in range(3):
        for name, gradient in values(step + 1).items():
            parts[name].parameter.grad = gradient
        optimizer.step(0.01 * (step + 1))
    return {name: part.parameter.detach() for name, part in parts.items()}


def updated_by_torch(settings: dict[str, dict[str, object]]) -> dict[str, torch.Tensor]:
    """Return the parameters after three steps of torch's AdamW, each parameter a group of its own."""
    parameters = {name: nn.Parameter(tensor) for name, tensor in values(0).items()}
    adamw = torch.optim.AdamW([{"params": [parameters[name]], **given} for name, given in settings.items()])
    for step in range(3):
        for name, gradient in values(step + 1).items():
            parameters[name].grad = gradient
        for group in adamw.param_groups:
            group["lr"] = 0.01 * (step + 1)
        adamw.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


def usual(weight_decay: float) -> dict[str, object]:
    return {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": weight_decay}


BASE = OptimizerConfig(betas=(0.8, 0.9), eps=1e-3, weight_decay=0.5)


@pytest.mark.parametrize(
    ("groups", "changed"),
    [
        ([], {}),
        (
            [{"match": "*.router.weight", "weight_decay": 0.0}],
            {name: {"weight_decay": 0.0} for name in SHAPES if "router" in name},
        ),
        (
            [{"match": "embedding.weight", "betas": (0.5, 0.6), "eps": 1e-6}],
            {"embedding.weight": {"betas": (0.5, 0.6), "eps": 1e-6}},
        ),
        (  # settings of another kind leave a norm without decay, weight_decay itself does not
            [{"match": "*.norm.weight", "eps": 1e-6}, {"match": "*_bias", "weight_decay": 2.0}],
            {
                "layers.0.mixer.norm.weight": {"eps": 1e-6},
                "layers.0.feedforward.part.experts.up_bias": {"weight_decay": 2.0},
            },
        ),
        (  # the first that fits wins
            [{"match": "layers.1.*", "eps": 1e-6}, {"match": "*.router.weight", "weight_decay": 0.0, "eps": 1.0}],
            {
                "layers.1.feedforward.part.router.weight": {"eps": 1e-6},
                "layers.0.feedforward.part.router.weight": {"weight_decay": 0.0, "eps": 1.0},
            },
        ),
    ],
)
def test_groups_update_as_torch_does(groups: list[dict[str, object]], changed: dict[str, dict[str, object]]) -> None:
    config = BASE.model_copy(update={"groups": tuple(OptimizerGroup.model_validate(group) for group in groups)})
    settings = {
        name: usual(0.0 if len(shape) == 1 or name.endswith("bias") else 0.5) | changed.get(name, {})
        for name, shape in SHAPES.items()
    }
    ours, theirs = updated_by_us(config), updated_by_torch(settings)
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)


def test_a_group_may_bring_back_the_decay_of_an_embedding() -> None:
    group = OptimizerGroup(match="embedding.weight", weight_decay=0.3)
    config = BASE.model_copy(update={"embedding_weight_decay": False, "groups": (group,)})
    ours = updated_by_us(config)
    decay = {name: 0.5 if "router" in name else 0.0 for name in SHAPES} | {"embedding.weight": 0.3}
    theirs = updated_by_torch({name: usual(decay[name]) for name in SHAPES})
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)


def test_weights_that_layers_share_decay_once_and_count_once_in_the_norm() -> None:
    config = dense_config(num_layers=6, distinct_layers=2)
    run = start_engine(single_process_mesh(), config, Plan())
    parts = run.engine.parts
    assert {name.split(".")[1] for name in parts if name.startswith("layers.")} == {"0", "1"}
    for part in parts.values():
        part.parameter.grad = torch.ones_like(part.parameter)
    assert gradient_norm(parts.values(), run.mesh.pp) == pytest.approx(parameter_count(config) ** 0.5)
    before = {name: part.parameter.detach().clone() for name, part in parts.items()}
    for part in parts.values():
        part.parameter.grad = torch.zeros_like(part.parameter)
    Optimizer(parts, OptimizerConfig(weight_decay=0.5), run.mesh).step(0.1)
    decayed = [name for name, part in parts.items() if not torch.equal(part.parameter, before[name])]
    assert {name.split(".")[1] for name in decayed if name.startswith("layers.")} == {"0", "1"}
    for name in decayed:
        torch.testing.assert_close(parts[name].parameter.detach(), before[name] * (1 - 0.1 * 0.5), msg=name)


def test_a_group_for_no_parameter_is_told_with_names_that_there_are(tmp_path: Path) -> None:
    groups = [
        '{match = "*.ruoter.weight", weight_decay = 0.0}',
        '{match = "layers.*", eps = 1e-6}',
        '{match = "layers.0.*", eps = 1e-7}',
    ]
    with pytest.raises(ConfigError) as caught:
        build(tmp_path, [f"optimizer.groups=[{', '.join(groups)}]"])
    wrong, shadowed = caught.value.problems
    assert wrong.startswith('optimizer.groups[0].match = "*.ruoter.weight": matches no parameter; there are ')
    assert "embedding.weight, " in wrong
    assert ", output.weight" in wrong
    assert shadowed.startswith('optimizer.groups[2].match = "layers.0.*": all parameters that it matches fall into')


def test_a_run_with_groups_trains_otherwise_and_goes_on(tmp_path: Path) -> None:
    groups = 'optimizer.groups=[{match = "*", betas = [0.5, 0.6], eps = 1e-3}]'
    (tmp_path / "plain").mkdir()
    start(tmp_path / "plain", "train.steps=2")
    start(tmp_path, groups, "train.steps=2")
    assert numbers(tmp_path, "loss")[0] == numbers(tmp_path / "plain", "loss")[0]
    assert numbers(tmp_path, "loss")[1] != numbers(tmp_path / "plain", "loss")[1]
    start(tmp_path, groups, "train.steps=3")
    assert numbers(tmp_path, "step") == [1, 2, 3]
