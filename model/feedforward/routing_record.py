"""Which experts the tokens of an inference went to, kept beside the caches, and used again.

    state = model.initial_state(2)                          records where tokens go
    model.step(tokens, state)
    again = replay_routing(model.initial_state(2), state)   sends the same tokens to the same experts, with the same
    model.step(tokens, again)                               weights: no router is asked

Replaying holds a policy that is trained by another engine, or a model whose routers have moved on, to the experts that
the tokens were seen with (rollout routing replay).
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from meshwright.model.room import refuse_beyond, with_room
from meshwright.model.routers.router import Routing


@dataclass
class RoutingRecord:
    """Where the tokens of an inference went."""

    experts: Int[Tensor, "room b k"]
    """-1 where a token has fewer than k."""
    weights: Float[Tensor, "room b k"]
    max_len: int | None
    """How many tokens it was made for; None: it grows with them."""
    length: int = 0
    is_replayed: bool = False
    """Whether the tokens go where the record says, and no router is asked."""

    def again(self, x: Float[Tensor, "s b h"]) -> Routing:
        """Return where the next tokens went when the record was written, and go on behind them.

        Raises:
            ValueError: if it has fewer tokens, or another number of samples.
        """
        begin, end = self.length, self.length + len(x)
        if end > len(self.experts) or x.shape[1] != self.experts.shape[1]:
            has = list(self.experts.shape[:2])
            raise ValueError(f"the recorded routing is of {has} tokens and samples, {[end, x.shape[1]]} are needed")
        expert, weight = self.experts[begin:end], self.weights[begin:end]
        there, self.length = expert >= 0, end
        taken = None if bool(there.all()) else there
        return Routing(expert.clamp(min=0).long(), weight, weight, weight, taken)

    def read(self) -> tuple[Int[Tensor, "s b k"], Float[Tensor, "s b k"]]:
        """Return the experts of the tokens seen so far, and their weights."""
        return self.experts[: self.length], self.weights[: self.length]

    def add(self, routing: Routing) -> None:
        """Write down where the next tokens go.

        Raises:
            ValueError: if there is no room for them.
        """
        (tokens, _, k), begin = routing.expert.shape, self.length
        end = begin + tokens
        refuse_beyond(self.max_len, end, "the record of routing")
        self.experts, self.weights = with_room(self.experts, end), with_room(self.weights, end)
        self.experts[begin:end], self.weights[begin:end] = -1, 0
        expert = routing.expert if routing.taken is None else routing.expert.masked_fill(~routing.taken, -1)
        self.experts[begin:end, :, :k], self.weights[begin:end, :, :k] = expert.to(self.experts), routing.weight
        self.length = end


def records_in(state: Any) -> Iterator[RoutingRecord]:
    """Yield the records within the state of a model, of a layer or of a part, in the order of the layers."""
    if isinstance(state, RoutingRecord):
        yield state
    elif isinstance(state, list | tuple):
        for inner in state:
            yield from records_in(inner)
    elif is_dataclass(state) and not isinstance(state, type):
        for field in fields(state):
            yield from records_in(getattr(state, field.name))


def replay_routing(state: Any, recorded: Any) -> Any:
    """Make a new state send its tokens where those of `recorded` went; return it.

    Raises:
        ValueError: if the two are not of one model.
    """
    new, old = list(records_in(state)), list(records_in(recorded))
    if len(new) != len(old):
        raise ValueError(f"the state has {len(new)} layers of experts, the recorded one {len(old)}")
    for record, of in zip(new, old, strict=True):
        record.experts, record.weights = (part.clone() for part in of.read())
        record.length, record.is_replayed = 0, True
    return state
