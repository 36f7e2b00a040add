"""What a checkpoint of a run is made of: how far it is, and the tensors that this rank holds.

tensors   weights by name, buffers.<name>
          optimizer.exp_avg.<name>, optimizer.exp_avg_sq.<name> of what AdamW updates, optimizer.momentum.<name> of
          what Muon updates
"""

from dataclasses import dataclass, field

from meshwright.launcher.build import Run
from meshwright.parallel.checkpoint.describe import HeldPart


@dataclass
class Progress:
    """How far a run is: everything that is not a tensor."""

    step: int = 0
    """Steps made, skipped ones included."""
    samples: int = 0
    updates: int = 0
    """Updates that the moments hold."""
    skipped: int = 0
    norms: list[float] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    """What was changed at which resume, for a person to read."""
    kernels: dict[str, str] = field(default_factory=dict)
    """The ways that the CPU kernels go (kernels/choose.py): other ways would round otherwise."""


def held_tensors(run: Run, *, optimizer: bool = True) -> dict[str, HeldPart]:
    """Return what this rank holds of every tensor that a checkpoint has."""
    tensors: dict[str, HeldPart] = {}
    for name, part in run.engine.parts.items():
        tensors[name] = HeldPart(part.real(part.parameter.detach()), part.global_shape, part.offset)
        for moment, held in run.optimizer.moments(name).items() if optimizer else ():
            tensors[f"optimizer.{moment}.{name}"] = HeldPart(part.real(held), part.global_shape, part.offset)
    for name, buffer in run.buffers().items():
        tensors[f"buffers.{name}"] = HeldPart(buffer, tuple(buffer.shape), (0,) * buffer.dim())
    return tensors
