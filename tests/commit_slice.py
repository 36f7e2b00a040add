"""A slice of sampled cases for each commit: the same commit always gets the same cases, and every commit others.

Hypothesis draws them from a seed that is the commit's hash. Hash, seed and cases are printed; MESHWRIGHT_SAMPLE_SEED
draws another slice, and MESHWRIGHT_SAMPLES says how many.
"""

import os
import subprocess
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, assume, given, seed, settings

# Outside git, as in an unpacked source archive.
DEFAULT_SEED = 20261121


def commit() -> str:
    """Return the hash of this commit; "" outside git."""
    command = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def seed_of(commit_hash: str) -> int:
    """Return the seed of a commit's slice, or the one that was asked for."""
    given_seed = os.environ.get("MESHWRIGHT_SAMPLE_SEED")
    if given_seed is not None:
        return int(given_seed)
    return int(commit_hash[:15], 16) if commit_hash else DEFAULT_SEED


def is_drawn(name: str, number: int, share: int) -> bool:
    """Say whether a name is among the one in `share` that a seed draws."""
    return int(sha256(f"{number} {name}".encode()).hexdigest(), 16) % share == 0


def check_slice(
    what: str,
    count: int,
    strategy: Any,
    capfd: pytest.CaptureFixture[str],
    *,
    is_sound: Callable[[Any], bool],
    check: Callable[[Any], None],
) -> list[Any]:
    """Check this commit's cases, as many as are asked for, and return them; what is not sound is passed over."""
    commit_hash, passed = commit(), list[Any]()
    number, count = seed_of(commit_hash), int(os.environ.get("MESHWRIGHT_SAMPLES", count))
    with capfd.disabled():
        print(
            f"\ncommit {commit_hash or 'unknown'}: a slice of {count} sampled {what}, seed {number}", end="", flush=True
        )

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],  # a failing case is named; looking for a smaller one would take minutes
        suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
    )
    @given(strategy)
    def one_more(drawn: Any) -> None:
        assume(drawn not in passed and is_sound(drawn))
        with capfd.disabled():
            print(f"\nsample {len(passed) + 1} of {count}: {drawn}", end="", flush=True)
        check(drawn)
        passed.append(drawn)

    one_more()
    return passed
