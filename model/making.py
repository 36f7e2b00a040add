"""What a part is told besides the model's sizes, when it is made: where it stands, and how it is spread."""

from dataclasses import dataclass

from meshwright.parallel.config import ContextWay, ExpertExchange
from meshwright.parallel.initialise import InitPolicy
from meshwright.parallel.mesh import Mesh


@dataclass(frozen=True)
class Ways:
    """How parts reach what lies on other ranks, where there is more than one way to the same result."""

    context: ContextWay = "ring"
    """How attention reaches the positions of a sample over cp."""
    expert_exchange: ExpertExchange = "all_to_all"
    """How tokens reach their experts over ep."""


@dataclass(frozen=True)
class Making:
    """The place of a part in the stack, its mesh, and how its weights begin."""

    layer: str
    """The layer's global name, under which sums are tallied and numbers drawn: "layers.3"."""
    mesh: Mesh
    init: InitPolicy
    ways: Ways
