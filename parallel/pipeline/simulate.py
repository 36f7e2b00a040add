"""What a table of actions costs and whether it ends at all, found by running it on paper: no torch, no ranks.

Every rank takes its actions in order; an action waits for what it needs:

    F of a stage    for F of the stage before it, of the same micro-batch
    B, I            for its own F, and for B or I of the stage after it
    W               for its own I

A rank that waits for an action which comes later in its own list, or which waits for it in turn, stands for ever:
`simulate` says which ranks stand, at which action. Otherwise it returns times: `bubble` is the part of the ranks' time
in which they wait, `in_flight` how many micro-batches' activations each rank holds at once, a micro-batch counted once
for each of its stages, from its F until its B or W is through.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from meshwright.parallel.pipeline.orders import Action, Orders, Stages, orders_of

# A backward is twice a forward: the gradient of the input and that of the weights.
USUAL_COSTS: Mapping[str, float] = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}


class DeadlockError(ValueError):
    """A table of actions that never ends."""


@dataclass(frozen=True)
class Simulated:
    """A step on paper."""

    time: float
    """From the first action to the last, in the unit of the costs."""
    bubble: float
    """Part of all ranks' time in which they wait: 0 to 1."""
    in_flight: tuple[int, ...]
    """For each rank, the most activations of a stage and micro-batch that it holds at once."""
    starts: tuple[tuple[float, ...], ...]
    """When each rank begins each of its actions."""


def simulate(
    orders: Orders,
    num_stages: int,
    costs: Mapping[str, float] = USUAL_COSTS,
    stage_costs: tuple[float, ...] = (),
    handover: float = 0.0,
) -> Simulated:
    """Run a table; an action costs its kind's figure times its stage's, a message to another rank `handover`.

    Raises:
        DeadlockError: if no rank can go on; it names what each one waits for.
    """
    factor = stage_costs or (1.0,) * num_stages
    ends: dict[Action, tuple[float, int]] = {}
    at, free, busy = [0] * len(orders), [0.0] * len(orders), [0.0] * len(orders)
    starts: list[list[float]] = [[] for _ in orders]
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(orders):
            while at[rank] < len(actions):
                action = actions[at[rank]]
                found = [_done(needed, ends) for needed in _needs(action, num_stages)]
                if any(end is None for end in found):
                    break
                arrivals = [end + (handover if where != rank else 0.0) for end, where in filter(None, found)]
                start = max([free[rank], *arrivals])
                cost = costs[action.kind] * factor[action.stage]
                starts[rank].append(start)
                free[rank], busy[rank] = start + cost, busy[rank] + cost
                ends[action] = (free[rank], rank)
                at[rank] += 1
                moved = True
    standing = [rank for rank, actions in enumerate(orders) if at[rank] < len(actions)]
    if standing:
        raise DeadlockError("; ".join(_why(rank, orders[rank][at[rank]], num_stages, ends) for rank in standing))
    time = max(free)
    return Simulated(
        time,
        1.0 - sum(busy) / (time * len(orders)),
        tuple(most_in_flight(actions) for actions in orders),
        tuple(tuple(row) for row in starts),
    )


def predict(stages: Stages, micro_batches: int, stage_costs: tuple[float, ...] = ()) -> Simulated:
    """Return what a schedule costs for stages of these forward costs; the backward is twice as much."""
    return simulate(orders_of(stages, micro_batches), stages.count, stage_costs=stage_costs)


def most_in_flight(actions: list[Action]) -> int:
    """Return the most activations that a rank holds at once, whenever its actions come."""
    held = most = 0
    for action in actions:
        held += {"F": 1, "B": -1, "W": -1}.get(action.kind, 0)
        most = max(most, held)
    return most


def _needs(action: Action, num_stages: int) -> list[tuple[Action, ...]]:
    """Return what must be done before an action: one of each tuple."""
    stage, kind, micro_batch = action
    if kind == "F":
        return [(Action(stage - 1, "F", micro_batch),)] if stage else []
    if kind == "W":
        return [(Action(stage, "I", micro_batch),)]
    own: list[tuple[Action, ...]] = [(Action(stage, "F", micro_batch),)]
    if stage < num_stages - 1:
        own.append((Action(stage + 1, "B", micro_batch), Action(stage + 1, "I", micro_batch)))
    return own


def _done(alternatives: tuple[Action, ...], ends: dict[Action, tuple[float, int]]) -> tuple[float, int] | None:
    return next((ends[action] for action in alternatives if action in ends), None)


def _why(rank: int, action: Action, num_stages: int, ends: dict[Action, tuple[float, int]]) -> str:
    missing = [" or ".join(map(str, needed)) for needed in _needs(action, num_stages) if _done(needed, ends) is None]
    return f"rank {rank} stands at {action}, which waits for {' and '.join(missing)}"
