"""Many operators that are one to whoever keeps results of operators (parallel/recompute/policy.py).

    out, lse = as_one(NAME, lambda: ...)        whoever keeps results keeps these, by that name, and none of the inner

Attention by tiles is a hundred small products, each written over in place by what follows it: to keep the results of
these would take a row of scores for each token, and would give back something else than the products returned.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

Results = tuple[Tensor, ...]
Keeper = Callable[[str, Callable[[], Results]], Results]

# Of each thread its own: autograd computes again in threads of its own on a GPU.
_keeper: ContextVar[Keeper | None] = ContextVar("keeper", default=None)


def as_one(name: str, compute: Callable[[], Results]) -> Results:
    """Return what `compute` makes, or what was kept of it."""
    keeper = _keeper.get()
    return compute() if keeper is None else keeper(name, compute)


@contextmanager
def kept_by(keeper: Keeper) -> Iterator[None]:
    """Let `keeper` answer for what is one, inside."""
    token = _keeper.set(keeper)
    try:
        yield
    finally:
        _keeper.reset(token)
