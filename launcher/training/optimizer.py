"""The optimizer of a run: each parameter goes to AdamW or to Muon, by the rules of `runfile/optimizer_rules.py`.

    parts of this rank  --settings by name and global shape-->  AdamW    exp_avg, exp_avg_sq      (adamw.py)
                                                           -->  Muon     momentum                 (muon.py)

State is by global name and of the part's shape, so that a checkpoint of one layout loads into any other.
"""

from collections.abc import Mapping

from torch import Tensor

from meshwright.kernels.limits import USUAL, Limits
from meshwright.launcher.runfile.optimizer_rules import settings_of
from meshwright.launcher.runfile.tables import OptimizerConfig
from meshwright.launcher.training.adamw import AdamW
from meshwright.launcher.training.muon import Muon
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.zero.part import Part


class Optimizer:
    """Updates all parts of this rank."""

    def __init__(self, parts: Mapping[str, Part], config: OptimizerConfig, mesh: Mesh, limits: Limits = USUAL) -> None:
        """Divide the parts between the two; every rank of the mesh must come here. The moments are zero."""
        settings = {name: settings_of(name, part.global_shape, config) for name, part in parts.items()}
        self._is_muon = {name: each.kind == "muon" for name, each in settings.items()}
        self._adamw = AdamW({name: part for name, part in parts.items() if not self._is_muon[name]}, settings)
        by_muon = {name: part for name, part in parts.items() if self._is_muon[name]}
        self._muon = Muon(by_muon, settings, config, mesh, limits)

    def step(self, learning_rate: float) -> None:
        """Update every part from its gradient; every rank must call this."""
        self._adamw.step(learning_rate)
        self._muon.step(learning_rate)

    def moments(self, name: str) -> dict[str, Tensor]:
        """Return the state of one part by its names, of the part's shape."""
        return self._muon.moments(name) if self._is_muon[name] else self._adamw.moments(name)

    def set_updates(self, updates: int) -> None:
        """Say how many updates the moments hold, for AdamW's bias correction."""
        self._adamw.set_updates(updates)
