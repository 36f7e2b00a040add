"""How ranks are named in what a person reads: `rank 3`, `ranks 0, 2`. No torch is loaded here."""

from collections.abc import Collection


def named(ranks: Collection[int]) -> str:
    """Return the words for these ranks, in order."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"
