"""Read a pattern such as `2(*-)6(*E)`: which parts each layer of one period has.

    letter   is a          kind
    *        mixer         attention
    M        mixer         mamba2
    -        feed-forward  mlp
    E        feed-forward  moe

A number stands before what it repeats, a letter or a group in parentheses. A mixer letter begins a layer; a
feed-forward letter joins the mixer before it, or makes a layer without a mixer if that one has a feed-forward already:

    *-       (attention, mlp)                              Llama
    *E       (attention, moe)                              Mixtral
    3M*-     (mamba2, -) (mamba2, -) (mamba2, -) (attention, mlp)
    *-E      (attention, mlp) (-, moe)

The period is repeated until the stack has its number of layers. This file knows no sizes.
"""

from functools import lru_cache
from typing import NamedTuple

MIXERS = {"*": "attention", "M": "mamba2"}
FEEDFORWARDS = {"-": "mlp", "E": "moe"}
LETTERS = "".join([*MIXERS, *FEEDFORWARDS])

# A slip of the keyboard such as `99999999(*-)` must not eat the memory before it is reported.
MOST_LETTERS = 100_000


class LayerKinds(NamedTuple):
    """The kind of each part of one layer; None where the layer has no such part."""

    mixer: str | None
    feedforward: str | None


@lru_cache(maxsize=16)  # the checks of a run file ask again and again, and a pattern may be long
def parse_pattern(pattern: str) -> tuple[LayerKinds, ...]:
    """Return the layers of one period.

    Raises:
        ValueError: naming the character at fault, if this is no pattern.
    """
    layers: list[LayerKinds] = []
    for letter in _expand(pattern):
        if letter in MIXERS:
            layers.append(LayerKinds(MIXERS[letter], None))
        elif layers and layers[-1].feedforward is None:
            layers[-1] = layers[-1]._replace(feedforward=FEEDFORWARDS[letter])
        else:
            layers.append(LayerKinds(None, FEEDFORWARDS[letter]))
    return tuple(layers)


def layers_of(pattern: str, num_layers: int) -> tuple[LayerKinds, ...]:
    """Repeat the pattern's period until there are `num_layers` layers.

    Raises:
        ValueError: if this is no pattern, or its period does not divide `num_layers`.
    """
    period = parse_pattern(pattern)
    if num_layers % len(period) != 0:
        raise ValueError(f"num_layers = {num_layers} does not divide by the {len(period)} layers of {pattern!r}")
    return period * (num_layers // len(period))


@lru_cache(maxsize=16)
def kinds_in(pattern: str) -> frozenset[LayerKinds]:
    """Return the kinds of layers that a pattern has, each once; none where it is no pattern (told elsewhere)."""
    try:
        return frozenset(parse_pattern(pattern))
    except ValueError:
        return frozenset()


def _expand(pattern: str) -> str:
    """Write out all repeats: `2(*-)E` becomes `*-*-E`."""
    written: list[str] = [""]  # what each open group holds so far; the first is the whole pattern
    counts: list[int] = []  # how often each open group is to be repeated
    digits = ""
    for at, character in enumerate(pattern, start=1):
        if character.isascii() and character.isdigit():
            digits += character
            continue
        if digits and (character == ")" or int(digits) == 0):
            raise ValueError(f"character {at}: {digits} must be 1 or more and stand before a letter or a group")
        count, digits = int(digits or 1), ""
        if character == "(":
            written.append("")
            counts.append(count)
            continue
        if character == ")":
            if not counts:
                raise ValueError(f"character {at}: this ) closes no group")
            count, piece = counts.pop(), written.pop()
            if not piece:
                raise ValueError(f"character {at}: the group is empty")
        elif character in LETTERS:
            piece = character
        else:
            raise ValueError(f"character {at}: {character!r} is none of the letters {' '.join(LETTERS)}")
        if len(written[-1]) + count * len(piece) > MOST_LETTERS:
            raise ValueError(f"character {at}: this repeats to more than {MOST_LETTERS} letters")
        written[-1] += piece * count
    if digits:
        raise ValueError(f"the number {digits} at the end stands before nothing")
    if counts:
        raise ValueError("a group is not closed: ) is missing")
    if not written[0]:
        raise ValueError("it is empty")
    return written[0]
