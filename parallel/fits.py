"""Which sizes would fit, for messages about one that does not: few, and near to what was given.

Sizes and shares that a caller gives a part are held to what they can be: the same line for the same mistake.
"""

import math
import operator
from collections.abc import Iterable, Mapping


def divisors(size: int) -> list[int]:
    """Return every whole number that divides `size`, the smallest first."""
    small = [number for number in range(1, int(size**0.5) + 1) if size % number == 0]
    return sorted({*small, *(size // number for number in small)})


def up_to(most: int) -> str:
    """Return the words for the sizes from 1 to `most`."""
    return f"1 to {most}" if most > 1 else "1"


def nearest(fits: Iterable[int], value: int, most: int = 8) -> list[int]:
    """Return the few of `fits` that are nearest to `value`, in order."""
    return sorted(sorted(fits, key=lambda size: abs(size - value))[:most])


def is_whole_number(value: object) -> bool:
    """Say whether a value counts something: of Python, of numpy, a tensor of one whole number."""
    try:
        operator.index(value)  # type: ignore[arg-type]  # which is the question
    except TypeError:
        return False
    return True


def check_sizes(sizes: Mapping[str, int], *, may_be_none: Iterable[str] = ()) -> None:
    """Hold sizes to being whole numbers of 1 or more; those in `may_be_none` may be 0.

    Raises:
        ValueError: naming each that is not.
    """
    wrong, none_fits = [], frozenset(may_be_none)
    for name, size in sizes.items():
        least, is_whole = 0 if name in none_fits else 1, is_whole_number(size)
        if not is_whole or size < least:
            wrong.append(f"{name} = {size}: must be {'' if is_whole else 'a whole number of '}at least {least}")
    if wrong:
        raise ValueError("\n".join(wrong))


def check_finite(numbers: Mapping[str, float | None], *, usual: float, least: float = -math.inf) -> None:
    """Hold numbers, of which `usual` would be one, to being finite and no less than `least`.

    Raises:
        ValueError: naming each that is not.
    """
    rule = "must be finite" if least == -math.inf else f"must be at least {least:g} and finite"
    wrong = [
        f"{name} = {value}: {rule}; {usual} would fit"
        for name, value in numbers.items()
        if value is None or not (math.isfinite(value) and value >= least)
    ]
    if wrong:
        raise ValueError("\n".join(wrong))


def check_share(name: str, value: float) -> None:
    """Hold what is dropped to a share.

    Raises:
        ValueError: if nothing, or more than there is, would be left.
    """
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} = {value}: must be at least 0 and below 1; 0.1 would fit")


def check_not_below_zero(name: str, value: float) -> None:
    """Hold a weight, or a factor that 0 turns off, to what it can be.

    Raises:
        ValueError: if it is below 0, endless or no number.
    """
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} = {value}: must be at least 0 and finite; 0 turns it off")


def check_known(name: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Hold names to those that there are.

    Raises:
        ValueError: naming the others, and what would fit.
    """
    fits = list(known)
    if strange := sorted(set(given) - set(fits)):
        raise ValueError(f"{name} = {', '.join(map(repr, strange))}: must be of {', '.join(map(repr, fits))}")
