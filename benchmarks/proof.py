"""Measure how far a layout is from fp64, beside one process in the same precision: `python benchmarks/proof.py`.

The figures by which `prove` judges a run's own precision (launcher/proof/own_precision.py) come from here. For each
layout, precision and seed one JSON line: the error of all gradients together, and of the worst tensor, in units of what
one process is off by; experts are the same in all (replayed from fp64), so that rounding is all that differs.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from statistics import median

import torch

from meshwright.launcher.proof.compare import errors_of
from meshwright.launcher.proof.forked import Fork
from meshwright.launcher.proof.narrow import on_layout
from meshwright.launcher.proof.own_precision import ROUNDED, mean_square
from meshwright.launcher.proof.passes import passes_of, run_passes
from meshwright.launcher.proof.prove import Judge, plan_proof
from meshwright.launcher.proof.sublayouts import said
from meshwright.launcher.runfile.read import read_run_file

RUNS = Path(__file__).resolve().parents[1] / "runs"
EVEN_HEADS = ("model.num_heads=10", "model.num_kv_heads=2")
CASES: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("dense_tiny.toml", 2, ()),
    ("dense_tiny.toml", 4, ("parallel.tp=4",)),
    ("dense_tiny.toml", 8, ("parallel.tp=2", "parallel.pp=2", "train.global_batch_size=16")),
    ("moe_tiny.toml", 2, ()),
    ("moe_tiny.toml", 8, ("parallel.tp=2", "parallel.etp=2", "parallel.dp_replicate=2", *EVEN_HEADS)),
    ("llama3_8b.toml", 64, ("parallel.tp=8", "parallel.dp_replicate=2")),
    ("qwen3_30b_a3b.toml", 64, ("parallel.tp=4", "parallel.etp=2")),
)


def main() -> None:
    """Print a line for each layout, precision and seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    for precision in ("bf16_autocast", "bf16"):
        for name, world, overrides in CASES:
            for seed in range(seeds):
                measure(name, world, [*overrides, f"train.precision={precision}", f"run.seed={seed}"])


def measure(name: str, world: int, overrides: list[str]) -> None:
    """Print the line of one run on each of its sub-layouts."""
    run_file = read_run_file(RUNS / name, overrides, world_size=world)
    plan = plan_proof(run_file, world)
    judge = Judge(plan.narrowed.run_file, ("own",))
    (own,) = [one for one in passes_of(run_file.train.precision) if one.name == "own"]
    of_one = {(step, at): error for step, at, error in errors_of(judge.one["start"], [judge.one["own"]])}
    for sizes in plan.cover.layouts:
        work = partial(run_passes, on_layout(plan.narrowed.run_file, sizes), [own], judge.choices, None)
        with Fork(sizes.world, work) as ranks:
            records = [record["own"] for record in ranks.answers(300.0)]
        of_ranks = {(step, at): error for step, at, error in errors_of(judge.one["start"], records)}
        tensors = [key for key in of_one if key[1] not in ROUNDED]
        typical = {step: median(of_one[key] for key in tensors if key[0] == step) for step in (0, 1)}
        times = {key: of_ranks[key] / max(of_one[key], typical[key[0]]) for key in tensors}
        worst = max(times, key=lambda key: times[key])
        names = [at for step, at in tensors if step == 0]
        row: dict[str, object] = {"run_file": name, "layout": said(sizes), "precision": run_file.train.precision}
        row |= {"seed": run_file.run.seed, "typical_error": round(max(typical.values()), 5)}
        squares = [mean_square(of_ranks, step, names) / mean_square(of_one, step, names) for step in (0, 1)]
        row |= {"together": round(max(squares) ** 0.5, 3)}
        row |= {"worst": round(times[worst], 3), "worst_tensor": worst[1], "torch": torch.__version__}
        row |= {at: [f"{of_ranks[s, at]:.1e}" for s in (0, 1)] for at in ROUNDED}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
