"""The sizes of the small model that a proof trains in place of a large one, and what they must divide by.

`many` is what a size must divide by in all of the small layouts together (`Needs`); `target` is the layout that is
asked for, whose relations to the sizes stay. This file is arithmetic on sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, lcm
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from meshwright.parallel.mesh import Sizes

ALIGNED = 8  # numbers of bf16 in the 16 bytes that grouped products ask for


class Needs(NamedTuple):
    """By what the sizes of the small run must divide, over all the layouts that it will run on."""

    tp: int
    heads: int
    """What the heads are cut into: tp, and cp too where attention exchanges heads for tokens."""
    fewest_tp: int
    """The smallest size of tp above 1, or 1."""
    pp: int
    stages: int
    """Stages of a pipeline, all ranks' together."""
    cp: int
    ep: int
    etp: int
    dp: int

    @classmethod
    def of(cls, layouts: Sequence[Sizes], stages_per_rank: int, context: str) -> Needs:
        """Collect the sizes of the axes."""
        named = {name: lcm(*(getattr(sizes, name) for sizes in layouts)) for name in ("tp", "pp", "cp", "ep", "etp")}
        stages = max(sizes.pp * stages_per_rank if sizes.pp > 1 else 1 for sizes in layouts)
        heads = lcm(*(sizes.tp * (sizes.cp if context == "ulysses" else 1) for sizes in layouts))
        above_one = [sizes.tp for sizes in layouts if sizes.tp > 1]
        return cls(
            **named,
            stages=stages,
            heads=heads,
            fewest_tp=min(above_one, default=1),
            dp=lcm(*(sizes.dp_replicate * sizes.dp_shard for sizes in layouts)),
        )


class Small(NamedTuple):
    """What a small model must go with."""

    target: Sizes
    needs: Needs

    def inner(self, size: int, axis: int, many: int, *, above: int) -> int:
        """Return a width above another, so that no two dims are equal, that splits as `size` does over `axis`."""
        rest = size // axis % ALIGNED
        return many * (ALIGNED * (above // (many * ALIGNED) + 1) + rest)

    def heads(self, heads: int, kv_heads: int) -> tuple[int, int]:
        """Return numbers of heads that relate to each other, and to what they are cut into, as the model's do."""
        needs, many, tp = self.needs, self.needs.tp, self.target.tp
        group = heads // kv_heads
        if kv_heads < tp:  # several ranks hold copies of one KV head, and several heads are there if tp leaves room
            return needs.heads * min(2, max(1, heads // tp)), 2 if kv_heads > 1 and needs.fewest_tp >= 4 else 1
        # Where a rank's key heads do not divide over cp, attention that exchanges them repeats them: so must these few.
        are_repeated = needs.heads > needs.tp and kv_heads // tp % self.target.cp != 0
        several = 3 if are_repeated and needs.cp % 2 == 0 else 2
        few = 1 if kv_heads == 1 else many * (1 if kv_heads == tp else several)
        few_heads = few * (1 if group == 1 else 3 if group % 2 else 2)
        return few_heads * (needs.heads // gcd(needs.heads, few_heads)), few


def small_head_dim(heads: int, at_least: int, hidden_size: int) -> int:
    """Return a width of a head with which all together are aligned as `hidden_size` is, if there is one."""
    wanted = gcd(hidden_size, ALIGNED)
    fitting = (dim for dim in range(at_least, at_least + ALIGNED + 1, 2) if gcd(heads * dim, ALIGNED) == wanted)
    return next(fitting, at_least)
