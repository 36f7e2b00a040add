"""Every file in runs/ and runs/parts/, at the world size that its header names, computes what one process computes.

Those of runs/ are proved at every change, those of runs/parts/ by share (tests/conftest.py).
"""

import re
from pathlib import Path

import pytest

from meshwright.launcher.proof.prove import plan_proof, prove
from meshwright.launcher.proof.world import usual_world
from meshwright.launcher.runfile.read import read_run_file

RUNS = Path(__file__).resolve().parents[3] / "runs"
FILES = sorted(path.name for path in RUNS.glob("*.toml"))
PARTS = sorted(path.name for path in (RUNS / "parts").glob("*.toml"))


def documented_world(path: Path) -> int:
    """Return the ranks that the file's header names; where it names none, what its axes multiply to."""
    named = re.search(r"^#.*--(?:world-size|ranks) (\d+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return int(named[1]) if named else usual_world(read_run_file(path, []).parallel)


def check(path: Path) -> None:
    world = documented_world(path)
    done = prove(plan_proof(read_run_file(path, [], world_size=world), world))
    assert done.is_same, [result.first for result in done.results]


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_run_file_computes_what_one_process_computes(name: str) -> None:
    check(RUNS / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_the_run_file_of_a_part_computes_what_one_process_computes(name: str) -> None:
    check(RUNS / "parts" / name)


def test_the_world_sizes_are_those_of_the_headers() -> None:
    worlds = {name: documented_world(RUNS / name) for name in FILES}
    assert worlds["moe_tiny.toml"] == worlds["hybrid_tiny.toml"] == 2
    assert worlds["llama3_8b.toml"] == worlds["qwen3_30b_a3b.toml"] == 64
    assert {documented_world(RUNS / "parts" / name) for name in PARTS} == {2}
