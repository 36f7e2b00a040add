"""AdamW over this rank's parts (Loshchilov and Hutter 2019), with its two moments by global name.

The parts are plain tensors in at least fp32, whatever the layout, and the update is element by element, so torch's
fused AdamW serves them all; parts with equal settings share one group of it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from meshwright.launcher.runfile.optimizer_rules import Settings
from meshwright.parallel.zero.part import Part

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW:
    """AdamW with decoupled weight decay."""

    def __init__(self, parts: Mapping[str, Part], settings: Mapping[str, Settings]) -> None:
        """Make the parameter groups and the moments, all zero; there may be no parts."""
        self._parts = parts
        alike: dict[Settings, list[nn.Parameter]] = {}
        for name, part in parts.items():
            if part.parameter.numel():
                alike.setdefault(settings[name], []).append(part.parameter)
        self._factors = [each.learning_rate_factor for each in alike]
        devices = {part.parameter.device for part in parts.values()}
        groups = [
            {"params": parameters, "betas": each.betas, "eps": each.eps, "weight_decay": each.weight_decay}
            for each, parameters in alike.items()
        ]
        is_fused = {device.type for device in devices} <= {"cpu", "cuda"}
        self._adamw = torch.optim.AdamW(groups, lr=0.0, fused=is_fused) if groups else None
        # Made here, not at the first step, so that a checkpoint can be loaded into them.
        self._state: dict[str, dict[str, Tensor]] = {}
        for name, part in parts.items():
            held = part.parameter
            self._state[name] = {moment: torch.zeros_like(held) for moment in MOMENTS}
            if self._adamw is not None:
                self._adamw.state[held] = {"step": torch.zeros((), device=held.device), **self._state[name]}

    def step(self, learning_rate: float) -> None:
        """Update every part from its gradient."""
        if self._adamw is None:
            return
        for group, factor in zip(self._adamw.param_groups, self._factors, strict=True):
            group["lr"] = learning_rate * factor
        self._adamw.step()

    def moments(self, name: str) -> dict[str, Tensor]:
        """Return the moments of one part by their names, of the part's shape."""
        return self._state[name]

    def set_updates(self, updates: int) -> None:
        """Say how many updates the moments hold, for their bias correction."""
        if self._adamw is not None:
            for state in self._adamw.state.values():
                state["step"].fill_(float(updates))
