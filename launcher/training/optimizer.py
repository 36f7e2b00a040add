"""AdamW over this rank's parts: which parts decay, and the moments by global name.

The parts are plain tensors in at least fp32, whatever the layout, so torch's fused AdamW serves them all. Norms
and biases do not decay (they have one dim, or are a bias of stacked experts), embeddings by choice.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from meshwright.launcher.runfile.tables import OptimizerConfig
from meshwright.parallel.zero.part import Part

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019)."""

    def __init__(self, parts: Mapping[str, Part], config: OptimizerConfig) -> None:
        """Make the parameter groups and the moments, all zero."""
        self._parts = parts
        held = {name: part for name, part in parts.items() if part.parameter.numel()}
        groups = [
            {"params": [p.parameter for n, p in held.items() if decays(n, p, config) is wanted], "weight_decay": decay}
            for wanted, decay in ((True, config.weight_decay), (False, 0.0))
        ]
        device = next(iter(parts.values())).parameter.device
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=0.0,
            betas=config.betas,
            eps=config.eps,
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


def decays(name: str, part: Part, config: OptimizerConfig) -> bool:
    """Say whether weight decay acts on a parameter."""
    if len(part.global_shape) <= 1 or name.endswith("bias"):
        return False
    return config.embedding_weight_decay or name not in ("embedding.weight", "output.weight")
