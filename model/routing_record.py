"""Which experts the tokens of an inference went to, kept beside the caches, and used again.

    state = model.initial_state(2)                          records where tokens go
    model.step(tokens, state)
    again = replay_routing(model.initial_state(2), state)   sends the same tokens to the same experts, with the same
    model.step(tokens, again)                               weights: no router is asked

Replaying holds a policy that is trained by another engine, or a model whose routers have moved on, to the experts that
the tokens were seen with (rollout routing replay). A mixture of experts has one record; SwitchHead attention has two,
of its values and of its output, with the choices of each head; a Mixture-of-Depths layer has one of the tokens that it
let through, beside those of its parts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from meshwright.kernels.precision import at_least_fp32
from meshwright.model.room import refuse_beyond, with_room
from meshwright.model.routers.router import Routing

_ONE_MODEL = "both must be of one model"


@dataclass
class RoutingRecord:
    """Where the tokens of an inference went."""

    experts: Int[Tensor, "room b *heads k"]
    """-1 where a token has fewer than k."""
    weights: Float[Tensor, "room b *heads k"]
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

    def read(self) -> tuple[Int[Tensor, "s b *heads k"], Float[Tensor, "s b *heads k"]]:
        """Return the experts of the tokens seen so far, and their weights."""
        return self.experts[: self.length], self.weights[: self.length]

    def add(
        self,
        expert: Int[Tensor, "s b *heads k"],
        weight: Float[Tensor, "s b *heads k"],
        taken: Bool[Tensor, "s b *heads k"] | None = None,
    ) -> None:
        """Write down where the next tokens go; `taken` says which choices there are, None that all are.

        Raises:
            ValueError: if there is no room for them.
        """
        k, begin, end = expert.shape[-1], self.length, self.length + len(expert)
        refuse_beyond(self.max_len, end, "the record of routing")
        self.experts, self.weights = with_room(self.experts, end), with_room(self.weights, end)
        self.experts[begin:end], self.weights[begin:end] = -1, 0
        expert = expert if taken is None else expert.masked_fill(~taken, -1)
        self.experts[begin:end, ..., :k], self.weights[begin:end, ..., :k] = expert.to(self.experts), weight
        self.length = end


def empty_record(batch: int, max_len: int | None, choices: tuple[int, ...], like: Tensor) -> RoutingRecord:
    """Return a record of no tokens yet, each of which makes so many choices: k of them, or k for each head."""
    weights = at_least_fp32(like.new_empty(max_len or 0, batch, *choices))
    return RoutingRecord(weights.new_empty(weights.shape, dtype=torch.int32), weights, max_len)


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
        raise ValueError(f"the state has {len(new)} records of routing, the recorded one {len(old)}: {_ONE_MODEL}")
    for record, of in zip(new, old, strict=True):
        ours, theirs = (list(each.experts.shape[2:]) for each in (record, of))
        if ours != theirs:
            raise ValueError(f"the state has {ours} choices of a token, the recorded one {theirs}: {_ONE_MODEL}")
    for record, of in zip(new, old, strict=True):
        record.experts, record.weights = (part.clone() for part in of.read())
        record.length, record.is_replayed = 0, True
    return state
