"""AdamW over this rank's parts: which settings hold for which part, and the moments by global name.

    optimizer.groups, in order     the first pattern that fits a name gives what it has; the rest is [optimizer]'s
    [optimizer] weight_decay       not on norms and biases (one dim, or a bias of stacked experts), on embeddings by
                                   choice; a group that gives weight_decay means it for all that it fits

The parts are plain tensors in at least fp32, whatever the layout, so torch's fused AdamW serves them all; parts with
equal settings share one group of it.
"""

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from meshwright.launcher.runfile.messages import ConfigError, problem
from meshwright.launcher.runfile.tables import OptimizerConfig, OptimizerGroup
from meshwright.parallel.zero.part import Part

MOMENTS = ("exp_avg", "exp_avg_sq")


class Settings(NamedTuple):
    """What AdamW does to one parameter."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float


class Optimizer:
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019)."""

    def __init__(
        self, parts: Mapping[str, Part], config: OptimizerConfig, all_names: Collection[str] | None = None
    ) -> None:
        """Make the parameter groups and the moments, all zero; `all_names` are the whole model's, if others hold some.

        Raises:
            ConfigError: if one of the config's groups is for no parameter; every rank finds the same.
        """
        problems = group_problems(parts if all_names is None else all_names, config)
        if problems:
            raise ConfigError("optimizer.groups", problems, is_same_on_all_ranks=True)
        self._parts = parts
        alike: dict[Settings, list[nn.Parameter]] = {}
        for name, part in parts.items():
            if part.parameter.numel():
                alike.setdefault(settings_of(name, part, config), []).append(part.parameter)
        device = next(iter(parts.values())).parameter.device
        self._adamw = torch.optim.AdamW(
            [{"params": parameters, **settings._asdict()} for settings, parameters in alike.items()],
            lr=0.0,
            fused=device.type in ("cpu", "cuda"),
        )
        # Made here, not at the first step, so that a checkpoint can be loaded into them.
        for part in parts.values():
            self._adamw.state[part.parameter] = {
                "step": torch.zeros((), device=device),
                **{moment: torch.zeros_like(part.parameter) for moment in MOMENTS},
            }

    def step(self, learning_rate: float) -> None:
        """Update every part from its gradient."""
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()

    def moment(self, name: str, moment: str) -> Tensor:
        """Return the moment of one part, of the part's shape."""
        held: Tensor = self._adamw.state[self._parts[name].parameter][moment]
        return held

    def set_updates(self, updates: int) -> None:
        """Say how many updates the moments hold, for their bias correction."""
        for state in self._adamw.state.values():
            state["step"].fill_(float(updates))


def settings_of(name: str, part: Part, config: OptimizerConfig) -> Settings:
    """Return the settings of one parameter: its group's, and what that leaves out from the config."""
    group = _group_of(name, config) or OptimizerGroup(match=name)
    weight_decay = group.weight_decay
    if weight_decay is None:
        weight_decay = config.weight_decay if decays(name, part, config) else 0.0
    return Settings(
        betas=config.betas if group.betas is None else group.betas,
        eps=config.eps if group.eps is None else group.eps,
        weight_decay=weight_decay,
    )


def decays(name: str, part: Part, config: OptimizerConfig) -> bool:
    """Say whether [optimizer]'s weight decay acts on a parameter."""
    if len(part.global_shape) <= 1 or name.endswith("bias"):
        return False
    return config.embedding_weight_decay or name not in ("embedding.weight", "output.weight")


def group_problems(names: Collection[str], config: OptimizerConfig) -> list[str]:
    """Return a line for each group that no parameter falls into."""
    used = [_group_of(name, config) for name in names]
    found = []
    for at, group in enumerate(config.groups):
        if any(one is group for one in used):
            continue
        key = f"optimizer.groups[{at}].match"
        if any(fnmatchcase(name, group.match) for name in names):
            rule = "all parameters that it matches fall into groups before it"
            found.append(problem(key, group.match, rule, "move it up, or leave it out"))
        else:
            few = list(names)
            few = few if len(few) <= 6 else [*few[:3], "...", *few[-3:]]
            found.append(problem(key, group.match, "matches no parameter", f"there are {', '.join(few)}"))
    return found


def _group_of(name: str, config: OptimizerConfig) -> OptimizerGroup | None:
    """Return the first group whose pattern fits the name."""
    return next((group for group in config.groups if fnmatchcase(name, group.match)), None)
