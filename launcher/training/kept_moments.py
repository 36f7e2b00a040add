"""Which of a checkpoint's moments a run goes on with when a parameter's optimizer is another one than before.

    to Muon     its two moments are dropped, its average begins at zero: the update's size is not the average's
    to AdamW    its average is dropped, and AdamW's moments of all parameters begin anew, with their count of
                updates: one count corrects the bias of all of them

Everything else is taken over, and what is dropped is told by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from meshwright.launcher.runfile.optimizer_rules import changed_kinds, few_of
from meshwright.launcher.runfile.tables import RunFile
from meshwright.launcher.training.adamw import MOMENTS
from meshwright.launcher.training.muon import MOMENTUM
from meshwright.model.counts.shapes import parameter_shapes
from meshwright.parallel.checkpoint.describe import HeldPart


@dataclass(frozen=True)
class Kept:
    """What is read of a checkpoint's moments."""

    left_out: tuple[str, ...] = ()
    """Beginnings of names of tensors that begin at zero."""
    keeps_updates: bool = True
    """Whether the count of updates is that of the checkpoint."""
    notes: tuple[str, ...] = ()
    """What is dropped, for a person to read."""

    @property
    def may_stay_unread(self) -> tuple[str, ...]:
        """Return the beginnings of names in the checkpoint that nobody may ask for."""
        return ("optimizer.",) if self.notes else ()

    def of(self, tensors: Mapping[str, HeldPart]) -> dict[str, HeldPart]:
        """Return those tensors that are read."""
        return {name: held for name, held in tensors.items() if not name.startswith(self.left_out)}


def kept_moments(before: RunFile, after: RunFile) -> Kept:
    """Compare the optimizers of a checkpoint's run file and of the one given now; the model is the same."""
    changed = changed_kinds(parameter_shapes(after.model), before.optimizer, after.optimizer)
    to_muon = [name for name, kind in changed.items() if kind == "muon"]
    to_adamw = [name for name, kind in changed.items() if kind == "adamw"]
    left_out = [f"optimizer.{MOMENTUM}.{name}" for name in to_muon]
    notes = []
    if to_muon:
        notes.append(f"Muon takes over {few_of(to_muon)}: the moments of AdamW are dropped, the average begins at zero")
    if to_adamw:
        left_out += [f"optimizer.{moment}." for moment in MOMENTS]
        notes.append(
            f"AdamW takes over {few_of(to_adamw)}: the average of Muon is dropped, and the moments of all parameters"
            " of AdamW begin anew"
        )
    return Kept(tuple(left_out), not to_adamw, tuple(notes))
