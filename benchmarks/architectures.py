"""The four architectures by the length of the context, and against transformers: `python benchmarks/architectures.py`.

    contexts   ours at 1K, 8K and 32K tokens, small (4 layers, hidden 128), one sample: a training step's tokens/s and
               peak memory; a prompt of that length, the tokens after it, the state that is carried
    peers      the comparison of `train_cpu.py`, all four shapes, training and decoding with the cache

A row of `contexts` is a process of its own, in our memory setting, so that its peak is its own: resident memory above
what it held when its libraries were loaded. Between two contexts the exponent e of cost ~ context^e is fitted: 1 is
linear, 2 quadratic, 0 constant. The longest context runs once without warming up, because a step is long there.
Prints JSON lines, then tables in Markdown.
"""

import argparse
import itertools
import json
import math
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from cpu_task import Task, task_of
from train_cpu import add_arguments, machine, prepare_tokens, start, tables_of, write_run_file

SMALL = {"num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 384, "expert_hidden_size": 192}
SMALL_PATTERN = {"hybrid": "M-M-*-M-"}
LONG = 16384
"""From here on a step is measured once."""
Row = dict[str, Any]


def main() -> None:
    """Run the parts that were asked for."""
    args = _arguments()
    with tempfile.TemporaryDirectory(prefix="architectures-") as name:
        folder, tables = Path(name), []
        if "contexts" in args.parts:
            tables += contexts(folder / "contexts", args)
        if "peers" in args.parts:
            (folder / "peers").mkdir()
            tables += tables_of(folder / "peers", args)
        print("\n\n".join([machine(args.threads), *tables]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["contexts", "peers"], default=["contexts", "peers"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 8192, 32768])
    add_arguments(parser)
    return parser.parse_args()


def contexts(folder: Path, args: argparse.Namespace) -> list[str]:
    """Measure every shape at every length; return the tables of training and of generation."""
    folder.mkdir()
    prepare_tokens(folder)
    rows: list[Row] = []
    for seq_len in args.contexts:
        for shape in args.shapes:
            for work in args.work:
                rows.append(_measured(_small(shape, work, seq_len, folder, args.threads)))
                line = json.dumps(rows[-1])
                print(line, flush=True)
                if args.out is not None:
                    with args.out.open("a") as file:
                        file.write(line + "\n")
    columns = {
        "train": {"tokens/s": "tokens_per_s", "s a step": "step_s", "CPU s": "cpu_s", "peak MiB": "peak_mib"},
        "decode": {
            "prompt s": "prompt_s",
            "ms a token": "token_ms",
            "state MiB": "state_mib",
            "peak MiB": "peak_mib",
        },
    }
    return [_table(work, columns[work], [row for row in rows if row["work"] == work]) for work in args.work]


def _small(shape: str, work: str, seq_len: int, folder: Path, threads: int) -> Task:
    task = task_of(shape, "fp32", threads, str(folder), work=work, seq_len=seq_len, prompt=seq_len, **SMALL)
    return replace(task, pattern=SMALL_PATTERN.get(shape, ""), batch=1, tie_embeddings=True, new_tokens=32)


def _measured(task: Task) -> Row:
    """Run one row in its own process."""
    write_run_file(task)
    contestant = start("ours", task, kept=True)
    row: Row = {"shape": task.shape, "work": task.work, "context": task.seq_len}
    try:
        contestant.answer()
        if task.seq_len < LONG:
            contestant.run(1)
        steps = 3 if task.seq_len < LONG // 4 else 1
        answer = contestant.run(steps)
    finally:
        contestant.end()
    row |= {"peak_mib": answer["peak_mib"], "load": round(os.getloadavg()[0], 1)}
    if task.work == "decode":
        found = answer["loss"]
        return row | {
            "prompt_s": found["prompt_s"],
            "token_ms": 1e3 * found["token_s"],
            "state_mib": found["state_mib"],
        }
    step = min(answer["seconds"])
    return row | {"step_s": step, "cpu_s": answer["cpu_seconds"] / steps, "tokens_per_s": task.seq_len / step}


def _table(work: str, columns: dict[str, str], rows: list[Row]) -> str:
    lengths = sorted({row["context"] for row in rows})
    lines = [
        f"### {work}, by context",
        "",
        f"| shape | {' | '.join(f'{name} at {n}' for name in columns for n in lengths)} |",
        "|---" * (1 + len(columns) * len(lengths)) + "|",
    ]
    exponents = ["", "| shape | " + " | ".join(f"exponent of {name}" for name in columns if name != "tokens/s") + " |"]
    exponents.append("|---" * (exponents[1].count("|") - 1) + "|")
    for shape in dict.fromkeys(row["shape"] for row in rows):
        at = {row["context"]: row for row in rows if row["shape"] == shape}
        lines.append(f"| {shape} | {' | '.join(_number(at[n][key]) for key in columns.values() for n in lengths)} |")
        fitted = [_exponents(at, key) for name, key in columns.items() if name != "tokens/s"]
        exponents.append(f"| {shape} | {' | '.join(fitted)} |")
    return "\n".join([*lines, *exponents])


def _exponents(at: dict[int, Row], key: str) -> str:
    """Return the exponent from each context to the next."""
    lengths = sorted(at)
    pairs = itertools.pairwise(lengths)
    return ", ".join(f"{math.log(at[m][key] / at[n][key]) / math.log(m / n):.2f}" for n, m in pairs)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
