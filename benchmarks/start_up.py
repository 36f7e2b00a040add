"""Time from the command to the first step, and the share of a step spent waiting for data.

    python benchmarks/start_up.py

Starts `meshwright train` as a user does, one process, preset `dense-tiny`, on a store that is made first, several times
after one start that warms the file cache. Prints one JSON line for each start and one with the medians:

    first_step_seconds    from the start of the process to the line of step 1 on its terminal
    cpu_seconds           processor time of the whole command (user and system)
    data_share            seconds waiting for data / seconds, over all steps after the first
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUN_FILE = """
[run]
name = "start-up"
folder = "{folder}"
device = "cpu"
[model]
preset = "dense-tiny"
[data]
store = "{store}"
seq_len = 128
[train]
steps = {steps}
global_batch_size = 8
micro_batch_size = 8
[learning_rate]
peak = 1e-3
"""


def main() -> None:
    """Make a store, start several times, print what each start took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "meshwright.launcher"]
        prepare = [*command, "prepare", "--out", str(folder / "store"), "--vocab-size", "4096"]
        subprocess.run(prepare, check=True, capture_output=True)
        rows = [start(command, folder, number, args.steps) for number in range(args.starts + 1)][1:]
    for row in rows:
        print(json.dumps(row))
    medians = {f"median_{key}": round(statistics.median(row[key] for row in rows), 4) for key in rows[0]}
    print(json.dumps({**medians, "starts": len(rows), "load": round(os.getloadavg()[0], 1)}))


def start(command: list[str], folder: Path, number: int, steps: int) -> dict[str, float]:
    """Start the command once and return what it took."""
    run_file, out = folder / f"{number}.toml", folder / f"run-{number}"
    run_file.write_text(RUN_FILE.format(folder=out, store=folder / "store", steps=steps))
    before, began, first = cpu_of_children(), time.perf_counter(), 0.0
    process = subprocess.Popen([*command, "train", str(run_file)], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 1 "):
            first = time.perf_counter() - began
    if process.wait() != 0 or not first:
        raise RuntimeError(f"the run of {run_file} failed")
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    later = [record for record in records if record["kind"] == "step" and record["step"] > 1]
    return {
        "first_step_seconds": round(first, 3),
        "cpu_seconds": round(cpu_of_children() - before, 3),
        "data_share": round(sum(r["seconds_data"] for r in later) / sum(r["seconds"] for r in later), 6),
    }


def cpu_of_children() -> float:
    """Return the processor seconds of all processes that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
