"""`--share N` runs one in N of the chosen tests, drawn by the commit's hash: a long suite fits, and all of it comes up.

Those that draw a slice of their own by that hash (`commit_slice.py`), and the proofs of the run files, run each time.

bash tests/run.sh -m slow              every slow test
bash tests/run.sh -m slow --share 2    half of them; the next commit draws another half
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from commit_slice import commit, is_drawn, seed_of

# Before torch is loaded, and for every process that a test starts: many ranks share few cores, and a rank that is
# forked from a process whose products ran on several threads would wait for those, which a fork does not have.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_ALWAYS = ("::test_sampled_", "::test_a_run_file_computes_")
"""Always drawn: tests that take a slice of their own (`commit_slice.py`), and what is promised of runs/*.toml; of the
files in runs/parts/ a share is drawn."""
LONGEST_FILE = "tests/slurm/test_pretrain_moe.py"  # the main job, four times


@pytest.fixture(autouse=True)
def _own_ways() -> Iterator[None]:
    """Let every test begin with PyTorch's own kernels, whatever the one before it chose."""
    from meshwright.kernels.choose import Choices, use

    use(Choices())
    yield
    use(Choices())


def pytest_addoption(parser: Any) -> None:
    """Add the option."""
    parser.addoption("--share", type=int, default=1, metavar="N", help="run one in N tests, drawn by the commit's hash")


def pytest_report_header(config: pytest.Config) -> str:
    """Say what was drawn, so that it can be drawn again."""
    share = config.getoption("share")
    if share == 1:
        return ""
    commit_hash = commit()
    return f"commit {commit_hash or 'unknown'}: one in {share} tests, MESHWRIGHT_SAMPLE_SEED={seed_of(commit_hash)}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the longest file, which one worker would else end with alone; leave out what was not drawn."""
    items.sort(key=lambda item: LONGEST_FILE not in item.nodeid)
    share = config.getoption("share")
    if share == 1:
        return
    seed = seed_of(commit())
    drawn = [
        item for item in items if any(name in item.nodeid for name in _ALWAYS) or is_drawn(item.nodeid, seed, share)
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in drawn])
    items[:] = drawn
