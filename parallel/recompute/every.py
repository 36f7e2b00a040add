"""Which layers are recomputed with `[recompute] mode = "full"`: every n-th of those that a rank holds, from its first.

    every = 2      layers 0 1 2 3 4, then those that predict further tokens   5 6      ->   0 2 4 6
                   on a rank that holds layers 3 4                                     ->   3

A layer that is used several times is one layer here, and is recomputed at each use or at none. The model that is built
(policy.py) and the count of its bytes ask here both. Nothing here loads torch.
"""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def every_nth(layers: Sequence[T], every: int) -> Sequence[T]:
    """Return those layers of a rank's that are recomputed, which it has in the order of their numbers."""
    return layers[::every]
