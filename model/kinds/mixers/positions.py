"""What positions can be made of: rules for the keys of [model], and for those made by hand (model/positions.py).

    stretching    numbers that must be in order, and what a kind of stretching asks of the features that are turned
    buckets       of T5: half of them one distance each, so that they are even, and the farthest lies beyond that half

Each takes the names by which its reader knows the numbers. Nothing here loads torch.
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

FEWEST_BUCKETS = 4


@runtime_checkable
class Scaling(Protocol):
    """The numbers of [model.rope_scaling], or of a `RopeScaling`."""

    @property
    def kind(self) -> str:
        """linear, ntk, yarn or llama3."""

    @property
    def original_length(self) -> int:
        """The length before."""

    @property
    def beta_fast(self) -> float:
        """Of yarn."""

    @property
    def beta_slow(self) -> float:
        """Of yarn."""

    @property
    def low_freq_factor(self) -> float:
        """Of llama3."""

    @property
    def high_freq_factor(self) -> float:
        """Of llama3."""


def stretching_problems(
    scaling: Scaling, turned: int, of: str, bases: Mapping[str, float | None], begin: str
) -> list[str]:
    """Return what is wrong where `turned` features of a head are turned, which follow from `of`.

    `bases` are those that are stretched, by name; `begin` stands before the names of the scaling's own numbers.
    """
    found, kind = [], f'{begin}kind = "{scaling.kind}"'
    if scaling.kind in ("yarn", "llama3") and not scaling.original_length:
        found.append(f'{begin}original_length = 0: kind = "{scaling.kind}" needs the length before; 4096 would fit')
    if scaling.kind == "ntk" and turned == 2:
        found.append(
            f"{kind}: changes the base, of which the first pair of features knows nothing, and {of}"
            ' turns no other; 4 features or more, or "linear", would fit'
        )
    found += [
        f"{name} = {base}: must be above 1 where {kind}; 10000.0 would fit"
        for name, base in bases.items()
        if scaling.kind in ("yarn", "ntk") and base and base <= 1.0
    ]
    if scaling.kind == "llama3" and scaling.low_freq_factor >= scaling.high_freq_factor:
        found.append(
            f"{begin}low_freq_factor = {scaling.low_freq_factor}: must be below {begin}high_freq_factor ="
            f" {scaling.high_freq_factor}; {scaling.high_freq_factor / 4} would fit"
        )
    if scaling.kind == "yarn" and scaling.beta_fast <= scaling.beta_slow:
        found.append(
            f"{begin}beta_fast = {scaling.beta_fast}: must be above {begin}beta_slow = {scaling.beta_slow};"
            f" {scaling.beta_slow * 32} would fit"
        )
    return found


def bucket_problems(num_buckets: int, max_distance: int, names: tuple[str, str]) -> list[str]:
    """Return what is wrong with T5's buckets; `names` are those of the two numbers."""
    of_buckets, of_distance = names
    fits, found = max(FEWEST_BUCKETS, num_buckets + num_buckets % 2), list[str]()
    if num_buckets != fits:
        found.append(
            f"{of_buckets} = {num_buckets}: must be even and at least {FEWEST_BUCKETS}, because half of them hold one"
            f" distance each; {fits} would fit"
        )
    if max_distance <= fits // 2:
        found.append(
            f"{of_distance} = {max_distance}: must be above {fits // 2}, half of {of_buckets} = {fits},"
            f" whose distances have a bucket each; {4 * fits} would fit"
        )
    return found
