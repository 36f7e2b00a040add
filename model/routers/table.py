"""The routers by name: a new one is one file and one line here."""

from typing import Any

from meshwright.model.routers.expert_choice import ExpertChoiceRouter
from meshwright.model.routers.noisy import NoisyTopKRouter
from meshwright.model.routers.router import Router
from meshwright.model.routers.sigmoid import SigmoidRouter
from meshwright.model.routers.sinkhorn import SinkhornRouter
from meshwright.model.routers.topk import SwitchRouter, TopKRouter

ROUTERS: dict[str, type[Router]] = {
    "softmax": TopKRouter,
    "sigmoid": SigmoidRouter,
    "switch": SwitchRouter,
    "sinkhorn": SinkhornRouter,
    "expert_choice": ExpertChoiceRouter,
    "noisy": NoisyTopKRouter,
}


def make_router(kind: str, *sizes: Any, **named: Any) -> Router:
    """Return a router of the named kind, made of what every router takes.

    Raises:
        ValueError: if there is no router of this name, or it does not do what is asked.
    """
    if kind not in ROUTERS:
        raise ValueError(f"router = {kind!r} is unknown; one of {', '.join(ROUTERS)} would fit")
    return ROUTERS[kind](*sizes, **named)
