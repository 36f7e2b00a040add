"""Read a pattern such as `2(*-)6(*E)`: which parts each layer of one period has.

    letter   is a          kind               (all of them: kinds/table.py)
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
    *-[*-]   (attention, mlp), and the same around which a router lets only some tokens in (Mixture-of-Depths)

The period is repeated until the stack has its number of layers. Behind it single layers may be put in place of what it
has at their numbers, which count from 0:

    *E @0-2 *-              the first three layers are dense (DeepSeek-V3)
    ME @5,15,25,35 *E       four layers of 40 have attention (Granite 4)

This file knows no sizes.
"""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

from meshwright.model.kinds.table import KINDS, OF_LETTER

LETTERS = "".join(OF_LETTER)

# A slip of the keyboard such as `99999999(*-)` must not eat the memory before it is reported.
MOST_LETTERS = 100_000
MOST_DIGITS = 5


class LayerKinds(NamedTuple):
    """The kind of each part of one layer; None where the layer has no such part."""

    mixer: str | None
    feedforward: str | None
    is_routed: bool = False
    """Whether only the tokens that a router chooses go through the layer (Mixture-of-Depths)."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the kinds that are there."""
        return tuple(kind for kind in (self.mixer, self.feedforward) if kind is not None)


@lru_cache(maxsize=16)  # the checks of a run file ask again and again, and a pattern may be long
def parse_pattern(pattern: str) -> tuple[LayerKinds, ...]:
    """Return the layers of one period.

    Raises:
        ValueError: naming the character at fault, if this is no pattern.
    """
    layers: list[LayerKinds] = []
    for letters, is_routed in _stretches(_expand(pattern.partition("@")[0].rstrip())):
        found = _layers(letters)
        if is_routed and len(found) != 1:
            raise ValueError(f"[{letters}] holds {len(found)} layers; Mixture-of-Depths goes around one")
        layers += [layer._replace(is_routed=is_routed) for layer in found]
    return tuple(layers)


@lru_cache(maxsize=16)
def parse_placed(pattern: str) -> Mapping[int, LayerKinds]:
    """Return the layers that stand in place of the period's, by number.

    Raises:
        ValueError: naming what is at fault, if this is no pattern.
    """
    found: dict[int, LayerKinds] = {}
    for piece in pattern.split("@")[1:]:
        numbers, _, letters = piece.strip().partition(" ")
        places = list(_numbers(numbers))
        layers = parse_pattern(letters.strip())
        if len(layers) != 1:
            raise ValueError(f"@{piece.strip()}: {letters.strip()} must be the letters of one layer, such as *-")
        for number in places:
            if number in found:
                raise ValueError(f"@{piece.strip()}: layer {number} is placed twice")
            found[number] = layers[0]
    return MappingProxyType(found)


def layers_of(pattern: str, num_layers: int) -> tuple[LayerKinds, ...]:
    """Repeat the pattern's period until there are `num_layers` layers, and put in those that have a place.

    Raises:
        ValueError: if this is no pattern, its period does not divide `num_layers`, or a place is none of them.
    """
    period = parse_pattern(pattern)
    if num_layers % len(period) != 0:
        raise ValueError(f"num_layers = {num_layers} does not divide by the {len(period)} layers of {pattern!r}")
    layers, placed = period * (num_layers // len(period)), parse_placed(pattern)
    if placed and max(placed) >= num_layers:
        raise ValueError(f"layer {max(placed)} of {pattern!r} is none of {num_layers} layers, 0 to {num_layers - 1}")
    return tuple(placed.get(number, layer) for number, layer in enumerate(layers)) if placed else layers


@lru_cache(maxsize=16)
def kinds_in(pattern: str) -> frozenset[LayerKinds]:
    """Return the kinds of layers that a pattern has, each once; none where it is no pattern (told elsewhere)."""
    try:
        return frozenset([*parse_pattern(pattern), *parse_placed(pattern).values()])
    except ValueError:
        return frozenset()


def letters_of(layer: LayerKinds) -> str:
    """Return how a pattern writes a layer."""
    letters = "".join(KINDS[name].letter for name in layer.names)
    return f"[{letters}]" if layer.is_routed else letters


def _numbers(text: str) -> Iterator[int]:
    """Yield the numbers of `0-2,5`."""
    for piece in text.split(","):
        first, dash, last = piece.partition("-")
        ends = [first, last if dash else first]
        if not all(end.isascii() and end.isdigit() and len(end) <= MOST_DIGITS for end in ends):
            raise ValueError(f"@{text}: must be numbers of layers with commas between, such as @0-2,5")
        if int(ends[0]) > int(ends[1]):
            raise ValueError(f"@{text}: {piece} counts down and places nothing; {last}-{first} would count up")
        yield from range(int(ends[0]), int(ends[1]) + 1)


def _layers(letters: str) -> list[LayerKinds]:
    layers: list[LayerKinds] = []
    for letter in letters:
        kind = OF_LETTER[letter]
        if kind.place == "mixer":
            layers.append(LayerKinds(kind.name, None))
        elif layers and layers[-1].feedforward is None:
            layers[-1] = layers[-1]._replace(feedforward=kind.name)
        else:
            layers.append(LayerKinds(None, kind.name))
    return layers


def _stretches(letters: str) -> Iterator[tuple[str, bool]]:
    """Yield the letters outside of brackets, and those within, in order."""
    rest = letters
    while rest:
        outside, opened, rest = rest.partition("[")
        if "]" in outside:
            raise ValueError("a ] closes no [")
        if outside:
            yield outside, False
        if opened:
            within, closed, rest = rest.partition("]")
            if not closed:
                raise ValueError("a [ is not closed: ] is missing")
            if "[" in within:
                raise ValueError("a [ stands within another")
            yield within, True


def _expand(pattern: str) -> str:
    """Write out all repeats: `2(*-)E` becomes `*-*-E`."""
    written: list[str] = [""]  # what each open group holds so far; the first is the whole pattern
    counts: list[int] = []  # how often each open group is to be repeated
    digits = ""
    for at, character in enumerate(pattern, start=1):
        if character.isascii() and character.isdigit():
            digits += character
            continue
        if digits and int(digits) == 0:
            raise ValueError(f"character {at}: the number before it is {digits}, and must be 1 or more")
        if digits and character in ")[]":
            rule = f"stands before this {character}, and must stand before a letter or a ("
            raise ValueError(f"character {at}: the number {digits} {rule}")
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
            if piece.count("[") != piece.count("]"):
                raise ValueError(f"character {at}: this ) closes a group that has a [ or ] without its other one")
        elif character in LETTERS or character in "[]":
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
