"""Which sizes would fit, for messages about one that does not: few, and near to what was given."""

from collections.abc import Iterable


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
