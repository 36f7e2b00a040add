#!/usr/bin/env bash
# Run the tests: `bash tests/run.sh`, or with pytest's own arguments: `bash tests/run.sh tests/kernels -k rope`.
#
# Makes the environment first if there is none (slurm/environment.sh). Without arguments: every test but those marked
# `slow` and `gpu`; those marked `slurm` start a Slurm of their own where its daemons are installed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

# shellcheck source=slurm/environment.sh
source "$root/slurm/environment.sh" || exit 2
cd "$root"

if ! "$meshwright_python" -c 'import pytest, xdist, beartype, hypothesis' 2>/dev/null; then
    meshwright_say "The active environment ($meshwright_python) has no pytest, pytest-xdist, beartype or hypothesis." \
        "Add them: $meshwright_python -m pip install -c constraints.txt pytest pytest-xdist beartype hypothesis"
    exit 2
fi
PYTHONPATH=$root/tests:$PYTHONPATH "$meshwright_python" - <<'PYTHON'
from virtual_slurm import why_not

reason = why_not()
print("tests/slurm:", f"its tests of a real Slurm will be skipped: {reason}" if reason else "with a Slurm of its own")
PYTHON

# Files are shared out over as many workers as there are cores, up to four: a test is often one process that waits for
# another. In order, with the longest first (tests/conftest.py, where threads are limited too): by the number of their
# tests, files with few long ones would come last.
workers=$(nproc 2>/dev/null || echo 2)
workers=$((workers < 4 ? workers : 4))
if [ $# -eq 0 ]; then
    set -- -m "not slow and not gpu" --durations=15 -n "$workers" --dist loadfile --no-loadscope-reorder
fi
exec "$meshwright_python" -m pytest "$@"
