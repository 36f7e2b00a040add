"""What a table of a run file may hold, and what a size in it may be."""

from fractions import Fraction
from typing import Annotated

from pydantic import ConfigDict, Field

# A closed table: what no field stands for is refused, and so is any number that is not finite.
TABLE = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False)

# No model comes near these bounds: what is beyond them is a slip of the keyboard, and would only end without memory.
MAX_SIZE, MAX_LAYERS = 2**24, 2**14
Size = Annotated[int, Field(gt=0, le=MAX_SIZE)]
SizeOrZero = Annotated[int, Field(ge=0, le=MAX_SIZE)]

# Sizes are rounded up to this, so that products and their parts stay aligned.
ALIGNMENT = 64


def round_up(size: int, multiple: int = ALIGNMENT) -> int:
    """Return the smallest multiple that is not below `size`."""
    return -(-size // multiple) * multiple


def usual_width(hidden_size: int) -> int:
    """Return the width of a feed-forward that is not given: 8/3 of the stream's, rounded up."""
    return round_up(-(-8 * hidden_size // 3))


def exact_share(share: float) -> Fraction:
    """Return a share or factor as it was written: 1.1 is eleven tenths, not a bit more."""
    return Fraction(str(share)).limit_denominator(10**6)
