"""Train one shape on a CPU with ours and with its peers, in turns: `python benchmarks/train_cpu.py --out rows.jsonl`.

    dense   8 layers, hidden 384, 6 heads, SwiGLU 1024, vocabulary 8192 untied, 512 tokens, batch 8: 20.5 M
    moe     the same with 8 experts of width 512, top-2, on each layer: 48.8 M

    ours                 the real model, data, step and optimizer of `meshwright train`, under its memory setting
    transformers         Llama or Qwen3Moe in a plain loop                      } once as their users run them,
    litgpt               litgpt.pretrain.setup, with torch.compile; dense only  } once under our memory setting
    ceiling              the step's matrix products alone, by each library

Each system is a process of its own (`train_cpu_systems.py`) that trains when told to. In a round every one trains a
few steps, in turn, so that what else the machine does falls on all of them alike; a ratio is taken within a round, and
the median over the rounds is told, with the quartiles; where the machine was busy, `--threads 1` and the ratio of CPU
times say more. Steps before the first round warm up and are not counted.
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

from memory_environment import environment_with
from train_cpu_systems import Task

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
        prepare(Path(folder))
        tables = []
        for shape in args.shapes:
            for precision in args.precisions:
                task = Task(shape, precision, args.threads, folder)
                rows = compete(task, args)
                tables.append(table_of(task, rows, args))
        print("\n\n".join([_machine(args.threads), *tables]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=["dense", "moe"], default=["dense", "moe"])
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--peers", nargs="*", choices=["transformers", "litgpt"], default=["transformers", "litgpt"])
    parser.add_argument("--memory", nargs="+", choices=["own", "kept"], default=["own", "kept"], help="of the peers")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="of each system in a round")
    parser.add_argument("--warm-up", type=int, default=3, help="steps of each system before the first round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--litgpt-python", default="", help="the python of an environment with litgpt")
    parser.add_argument("--out", type=Path, default=None, help="append the JSON lines to this file too")
    return parser.parse_args()


def prepare(folder: Path) -> None:
    """Make the token store, the run files, and the same tokens as one array for the peers."""
    import numpy as np

    from meshwright.data.prepare import PrepareOptions, prepare
    from meshwright.data.store import TokenStore

    task = Task("dense", "fp32", 1, str(folder))
    # A few packages of the embedded corpus are tokens enough.
    library = Path(os.__file__).parent
    packages = ("email", "asyncio", "json", "logging", "unittest", "http", "xml", "multiprocessing")
    sources = tuple(str(library / name / "**" / "*.py") for name in packages)
    prepare(PrepareOptions(folder / "store", sources, vocab_size=task.vocab_size, validation_fraction=0.0, workers=1))
    split = TokenStore.open(folder / "store").splits["train"]
    np.save(folder / "tokens.npy", split.read(0, split.num_tokens).astype(np.int32))
    feedforward = {
        "dense": f'pattern = "*-"\nffn_hidden_size = {task.ffn_hidden_size}\n',
        "moe": 'pattern = "*E"\nqk_norm = true\n[model.moe]\n'
        f"num_experts = {task.num_experts}\ntop_k = {task.top_k}\nexpert_hidden_size = {task.expert_hidden_size}\n",
    }
    for shape, lines in feedforward.items():
        (folder / f"{shape}.toml").write_text(
            f'[run]\nname = "bench"\nfolder = "{folder}/run"\ndevice = "cpu"\n'
            f'[data]\nstore = "{folder}/store"\nseq_len = {task.seq_len}\n'
            f"[train]\nsteps = 1000\nglobal_batch_size = {task.batch}\nmicro_batch_size = {task.batch}\n"
            f"[learning_rate]\npeak = {task.learning_rate}\n[zero]\nstage = 0\n"
            f"[model]\nnum_layers = {task.num_layers}\nhidden_size = {task.hidden_size}\n"
            f"num_heads = {task.num_heads}\nvocab_size = {task.vocab_size}\n{lines}"
        )


def compete(task: Task, args: argparse.Namespace) -> dict[str, Contestant]:
    """Start everyone, warm up, and let them take turns."""
    contestants = {"ceiling": _start("ceiling", task, kept=True), "ours": _start("ours", task, kept=True)}
    for peer in args.peers:
        if peer == "litgpt" and (task.is_moe or not args.litgpt_python):
            continue
        python = args.litgpt_python if peer == "litgpt" else sys.executable
        for memory in args.memory:
            name = peer if memory == "own" else f"{peer}, memory kept"
            contestants[name] = _start(peer, task, kept=memory == "kept", python=python, name=name)
    try:
        for contestant in contestants.values():
            contestant.about = contestant.answer()["about"]
        for contestant in contestants.values():
            contestant.run(args.warm_up)
        for number in range(args.rounds):
            for contestant in contestants.values():
                answer = contestant.run(args.steps)
                contestant.rounds.append(answer)
                row = {"shape": task.shape, "precision": task.precision, "system": contestant.name, "round": number}
                _tell(row | answer, args.out)
        _tell(summary_of(task, contestants, args), args.out)
    finally:
        for contestant in contestants.values():
            contestant.end()
    return contestants


def _start(system: str, task: Task, *, kept: bool, python: str = sys.executable, name: str = "") -> Contestant:
    environment = environment_with(kept=kept)
    environment |= {"OMP_NUM_THREADS": str(task.threads), "TOKENIZERS_PARALLELISM": "false"}
    name = name or system
    log = Path(task.folder, f"{name.replace(', ', '-').replace(' ', '-')}-{task.shape}-{task.precision}.log")
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
    """Return the tokens of a round's median step over its seconds."""
    return float(task.seq_len * task.batch / statistics.median(answer["seconds"]))


def summary_of(task: Task, contestants: dict[str, Contestant], args: argparse.Namespace) -> dict[str, Any]:
    """Return what the rounds come to: rates, ratios to ours, ceilings."""
    best = {
        name: max(answer["loss"][name] for answer in contestants["ceiling"].rounds)
        for name in contestants["ceiling"].rounds[0]["loss"]
    }
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
        f"### {task.shape}, {task.precision}",
        "",
        "| system | tokens/s (quartiles) | CPU s a step | page faults a step | peak MiB "
        "| ours / this (quartiles) | by CPU time |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in summary["summary"].items():
        rate, low, high = row["tokens_per_s"]
        ratio, ratio_low, ratio_high = row["ours_over_this"]
        compared, by_cpu = f"{ratio:.2f} ({ratio_low:.2f}-{ratio_high:.2f})", row["ours_over_this_by_cpu_time"][0]
        lines.append(
            f"| {name} | {rate:.0f} ({low:.0f}-{high:.0f}) | {row['cpu_s_per_step']:.2f} "
            f"| {row['page_faults_per_step']:.0f} | {row['peak_mib']} | {compared} | {by_cpu:.2f} |"
        )
    lines.append("")
    lines += [
        f"Ceiling, {name}: {row['gflop_per_s']:.0f} GFLOP/s = {row['tokens_per_s']:.0f} tokens/s."
        for name, row in summary["ceiling"].items()
    ]
    lines += ["", "Kernels of ours: " + "; ".join(contestants["ours"].about) + "."]
    return "\n".join(lines)


def _tell(row: dict[str, Any], out: Path | None) -> None:
    line = json.dumps(row)
    print(line, flush=True)
    if out is not None:
        with out.open("a") as file:
            file.write(line + "\n")


def _machine(threads: int) -> str:
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
