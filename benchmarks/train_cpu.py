"""Train one shape on a CPU with ours and with its peers, in turns: `python benchmarks/train_cpu.py --out rows.jsonl`.

The shapes (dense, moe, mamba, hybrid) and what `decode` does in place of `train` stand in `cpu_task.py`.

    ours                 the real model, data, step and optimizer of `meshwright train`, under its memory setting
    transformers         its class of the shape, in a plain loop                } once as their users run them,
    litgpt               litgpt.pretrain.setup, with torch.compile; dense only  } once under our memory setting
    ceiling              the step's matrix products alone, by each library

Ours and transformers start from the same weights, and nothing is timed where their logits differ (`peer_weights.py`).
Each system is a process of its own (`train_cpu_systems.py`) that trains when told to. In a round every one trains a
few steps, in turn, so that what else the machine does falls on all of them alike; a ratio is taken within a round, and
the median over the rounds is told, with the quartiles; where the machine was busy, `--threads 1` and the ratio of CPU
times say more. Steps before the first round warm up and are not counted. Peak memory is above what the process held
when its libraries were loaded.
litgpt wants an environment of its own: `pip install torch==2.13.0 litgpt==0.5.13` there, then --litgpt-python.

Prints a JSON line for each system and round and one that sums it up, then a table in Markdown.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from cpu_task import SHAPES, Task, task_of
from memory_environment import environment_with

WORKER = Path(__file__).with_name("train_cpu_systems.py")


@dataclass
class Contestant:
    """A system's process and what it has shown."""

    name: str
    process: subprocess.Popen[str]
    log: Path
    about: list[str] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def run(self, steps: int) -> dict[str, Any]:
        """Let it train so many steps; return its answer.

        Raises:
            RuntimeError: if it died; the end of what it printed is in the message.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"run": steps}) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Wait for the next line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended:\n{self.log.read_text()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """Close its orders and wait."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    """Run every shape and precision that was asked for."""
    args = _arguments()
    with tempfile.TemporaryDirectory(prefix="train-cpu-") as folder:
        print("\n\n".join([machine(args.threads), *tables_of(Path(folder), args)]))


def tables_of(folder: Path, args: argparse.Namespace) -> list[str]:
    """Run every shape, work and precision that was asked for; return a table for each."""
    prepare_tokens(folder)
    tables = []
    for shape in args.shapes:
        task = task_of(shape, "fp32", args.threads, str(folder))
        write_run_file(task)
        if "transformers" in args.peers:
            from peer_weights import write_peer_weights

            _tell({"shape": shape, "difference_of_logits": write_peer_weights(task)}, args.out)
        for work in args.work:
            for precision in args.precisions if work == "train" else ["fp32"]:
                task = task_of(shape, precision, args.threads, str(folder), work=work)
                tables.append(table_of(task, compete(task, args), args))
    return tables


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.set_defaults(shapes=["dense", "moe"], rounds=7, steps=2, warm_up=3, work=["train"])
    return parser.parse_args()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the comparison with peers knows."""
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--work", nargs="+", choices=["train", "decode"], default=["train", "decode"])
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32"], help="of training")
    parser.add_argument("--peers", nargs="*", choices=["transformers", "litgpt"], default=["transformers", "litgpt"])
    parser.add_argument("--memory", nargs="+", choices=["own", "kept"], default=["own", "kept"], help="of the peers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="of each system in a round")
    parser.add_argument("--warm-up", type=int, default=2, help="steps of each system before the first round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--litgpt-python", default="", help="the python of an environment with litgpt")
    parser.add_argument("--out", type=Path, default=None, help="append the JSON lines to this file too")


def prepare_tokens(folder: Path) -> None:
    """Make the token store, and the same tokens as one array for the peers."""
    import numpy as np

    from meshwright.data.prepare import PrepareOptions, prepare
    from meshwright.data.store import TokenStore

    # A few packages of the embedded corpus are tokens enough.
    library = Path(os.__file__).parent
    packages = ("email", "asyncio", "json", "logging", "unittest", "http", "xml", "multiprocessing")
    sources = tuple(str(library / name / "**" / "*.py") for name in packages)
    vocab_size = task_of("dense", "fp32", 1, str(folder)).vocab_size
    prepare(PrepareOptions(folder / "store", sources, vocab_size=vocab_size, validation_fraction=0.0, workers=1))
    split = TokenStore.open(folder / "store").splits["train"]
    np.save(folder / "tokens.npy", split.read(0, split.num_tokens).astype(np.int32))


def write_run_file(task: Task) -> None:
    """Write what `meshwright train` would be given for this task."""
    folder = Path(task.folder)
    keys = task.model_keys
    tables = {name: value for name, value in keys.items() if isinstance(value, dict)}
    lines = ["[model]", *_toml({name: value for name, value in keys.items() if name not in tables})]
    for name, table in tables.items():
        lines += [f"[model.{name}]", *_toml(table)]
    (folder / f"{task.shape}.toml").write_text(
        f'[run]\nname = "bench"\nfolder = "{folder}/run"\ndevice = "cpu"\n'
        f'[data]\nstore = "{folder}/store"\nseq_len = {task.seq_len}\n'
        f"[train]\nsteps = 1000\nglobal_batch_size = {task.batch}\nmicro_batch_size = {task.batch}\n"
        f"[learning_rate]\npeak = {task.learning_rate}\n[zero]\nstage = 0\n" + "\n".join(lines) + "\n"
    )


def _toml(table: dict[str, Any]) -> list[str]:
    return [f"{name} = {json.dumps(value)}" for name, value in table.items()]


def compete(task: Task, args: argparse.Namespace) -> dict[str, Contestant]:
    """Start everyone, warm up, and let them take turns."""
    contestants = {"ceiling": start("ceiling", task, kept=True)} if task.work == "train" else {}
    contestants["ours"] = start("ours", task, kept=True)
    for peer in args.peers:
        if peer == "litgpt" and (task.shape != "dense" or task.work != "train" or not args.litgpt_python):
            continue
        python = args.litgpt_python if peer == "litgpt" else sys.executable
        for memory in args.memory:
            name = peer if memory == "own" else f"{peer}, memory kept"
            contestants[name] = start(peer, task, kept=memory == "kept", python=python, name=name)
    try:
        for contestant in contestants.values():
            contestant.about = contestant.answer()["about"]
        for contestant in contestants.values() if args.warm_up else ():
            contestant.run(args.warm_up)
        for number in range(args.rounds):
            for contestant in contestants.values():
                answer = contestant.run(args.steps)
                contestant.rounds.append(answer)
                row = {"shape": task.shape, "work": task.work, "precision": task.precision}
                _tell(row | {"system": contestant.name, "round": number} | answer, args.out)
        _tell(summary_of(task, contestants, args), args.out)
    finally:
        for contestant in contestants.values():
            contestant.end()
    return contestants


def start(system: str, task: Task, *, kept: bool, python: str = sys.executable, name: str = "") -> Contestant:
    """Start a system in a process of its own, with memory that glibc keeps or gives back."""
    environment = environment_with(kept=kept)
    environment |= {"OMP_NUM_THREADS": str(task.threads), "TOKENIZERS_PARALLELISM": "false"}
    name = name or system
    words = f"{name.replace(', ', '-').replace(' ', '-')}-{task.shape}-{task.work}-{task.precision}"
    log = Path(task.folder, f"{words}.log")
    with log.open("w") as errors:
        process = subprocess.Popen(
            [python, str(WORKER), system, json.dumps(asdict(task))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
    return Contestant(name, process, log)


def tokens_per_second(task: Task, answer: dict[str, Any]) -> float:
    """Return the tokens of a round's median step over its seconds; of a generation, those after the prompt."""
    if task.work == "decode":
        return float(1.0 / answer["loss"]["token_s"])
    return float(task.seq_len * task.batch / statistics.median(answer["seconds"]))


def summary_of(task: Task, contestants: dict[str, Contestant], args: argparse.Namespace) -> dict[str, Any]:
    """Return what the rounds come to: rates, ratios to ours, ceilings."""
    ceiling = contestants["ceiling"].rounds if "ceiling" in contestants else []
    best = {name: max(answer["loss"][name] for answer in ceiling) for name in (ceiling[0]["loss"] if ceiling else [])}
    systems = {}
    for name, contestant in contestants.items():
        if name == "ceiling":
            continue
        rates = [tokens_per_second(task, answer) for answer in contestant.rounds]
        ratios = [
            tokens_per_second(task, mine) / rate for mine, rate in zip(contestants["ours"].rounds, rates, strict=True)
        ]
        cpu_ratios = [
            theirs["cpu_seconds"] / mine["cpu_seconds"]
            for theirs, mine in zip(contestant.rounds, contestants["ours"].rounds, strict=True)
        ]
        systems[name] = {
            "tokens_per_s": _spread(rates),
            "cpu_s_per_step": statistics.median(a["cpu_seconds"] / args.steps for a in contestant.rounds),
            "page_faults_per_step": statistics.median(a["page_faults"] / args.steps for a in contestant.rounds),
            "peak_mib": max(answer["peak_mib"] for answer in contestant.rounds),
            "ours_over_this": _spread(ratios),
            "ours_over_this_by_cpu_time": _spread(cpu_ratios),
            "about": contestant.about,
        }
    ceilings = {
        name: {"gflop_per_s": rate, "tokens_per_s": rate * 1e9 / task.flops_per_token} for name, rate in best.items()
    }
    named = {"shape": task.shape, "precision": task.precision, "rounds": args.rounds, "threads": task.threads}
    return named | {"summary": systems, "ceiling": ceilings}


def _spread(values: list[float]) -> list[float]:
    """Return the median and the quartiles."""
    if len(values) < 2:
        return [values[0]] * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return [round(x, 3) for x in (middle, low, high)]


def table_of(task: Task, contestants: dict[str, Contestant], args: argparse.Namespace) -> str:
    """Return the summary as a table in Markdown."""
    summary = summary_of(task, contestants, args)
    lines = [
        f"### {task.shape}, {task.work}, {task.precision}",
        "",
        "| system | tokens/s (quartiles) | CPU s a step | page faults a step | peak MiB "
        "| ours / this (quartiles) | by CPU time | ours / this, memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in summary["summary"].items():
        rate, low, high = row["tokens_per_s"]
        ratio, ratio_low, ratio_high = row["ours_over_this"]
        compared, by_cpu = f"{ratio:.2f} ({ratio_low:.2f}-{ratio_high:.2f})", row["ours_over_this_by_cpu_time"][0]
        lines.append(
            f"| {name} | {rate:.0f} ({low:.0f}-{high:.0f}) | {row['cpu_s_per_step']:.2f} "
            f"| {row['page_faults_per_step']:.0f} | {row['peak_mib']} | {compared} | {by_cpu:.2f} "
            f"| {summary['summary']['ours']['peak_mib'] / row['peak_mib']:.2f} |"
        )
    lines.append("")
    if task.work == "decode":
        lines += [_agreement(contestants), ""]
    lines += [
        f"Ceiling, {name}: {row['gflop_per_s']:.0f} GFLOP/s = {row['tokens_per_s']:.0f} tokens/s."
        for name, row in summary["ceiling"].items()
    ]
    lines += ["", "Kernels of ours: " + "; ".join(contestants["ours"].about) + "."]
    return "\n".join(lines)


def _agreement(contestants: dict[str, Contestant]) -> str:
    """Say how many of the tokens that ours gave every other gave too, and what its state takes."""
    mine = contestants["ours"].rounds[0]["loss"]
    given = [each.rounds[0]["loss"]["tokens"] for each in contestants.values()]
    same = [len(set(tokens)) == 1 for tokens in zip(*given, strict=True)]
    agreed = same.index(False) if False in same else len(same)
    return f"The first {agreed} of {len(same)} tokens are the same for all. State of ours: {mine['state_mib']:.1f} MiB."


def _tell(row: dict[str, Any], out: Path | None) -> None:
    line = json.dumps(row)
    print(line, flush=True)
    if out is not None:
        with out.open("a") as file:
            file.write(line + "\n")


def machine(threads: int) -> str:
    """Return a line on what this runs on."""
    import torch

    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = named[0] if named else platform.processor()
    load = os.getloadavg()[0]
    return (
        f"{model} ({torch.backends.cpu.get_cpu_capability()}), {threads} threads, torch {torch.__version__}, "
        f"{date.today()}, load at the end {load:.1f}."
    )


if __name__ == "__main__":
    main()
