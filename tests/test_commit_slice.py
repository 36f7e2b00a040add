"""What a commit draws: a fair share, always the same, and in time everything."""

from commit_slice import is_drawn, seed_of

NAMES = [f"tests/test_it.py::test_{number}" for number in range(600)]


def drawn(commit_hash: str, share: int) -> set[str]:
    return {name for name in NAMES if is_drawn(name, seed_of(commit_hash), share)}


def test_a_share_is_fair_and_of_the_commit() -> None:
    half, third = drawn("a" * 40, 2), drawn("a" * 40, 3)
    # Of 600 names 300 and 200, give or take four standard deviations of a fair draw (12.2 and 11.5).
    assert 251 < len(half) < 349
    assert 154 < len(third) < 246
    assert drawn("a" * 40, 2) == half
    assert drawn("b" * 40, 2) != half


def test_in_time_everything_is_drawn() -> None:
    """A name is passed over by 20 commits once in a million."""
    commits = [f"{number:x}" * 40 for number in range(1, 21)]
    assert set().union(*(drawn(commit_hash[:40], 2) for commit_hash in commits)) == set(NAMES)


def test_all_is_drawn_where_no_share_is_asked_for() -> None:
    assert drawn("a" * 40, 1) == set(NAMES)
