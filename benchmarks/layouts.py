"""What layouts cost on CPU ranks: `python benchmarks/layouts.py --parts bytes overhead ranks zero sums peak`.

    bytes      what each rank sends in a step, by axis, beside the textbook's number (tests/traffic_cases.py)
    overhead   our layers on one process beside plain nn modules, forward and backward, pairs taking turns
    ranks      one process on two threads beside two ranks of one thread: DP, TP, PP, EP, CP
    zero       ZeRO-1 beside torch's DDP, DDP with ZeroRedundancyOptimizer, and FSDP2, on two ranks
    sums       gloo's reduce-scatter beside ours, of 2 and 4 ranks
    peak       bytes of gradients that live at once in a step, by ZeRO stage and schedule

`--width` is the hidden size of the model of `ranks` and `zero` (docs/measured/layouts.md has 128): heads of 32, half as
many of keys and values, feed-forwards of three widths, experts of one and a half.

`--memory`: `kept` starts the process as the launcher starts ranks, told to keep the memory that it frees; `usual` is
what a process has whose user set nothing.

Prints Markdown tables. Contestants take turns in one run and ratios are taken within a turn; CPU time is the process's
own, which other work on the machine moves less than the wall's.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
import torch.distributed as dist
from layouts_ranks import CONTESTANTS, LAYOUTS_OF_TWO, time_contestants, time_layout, time_reduce_scatters
from memory_environment import environment_with
from torch import nn

from meshwright.model.feedforward.mlp import Mlp
from meshwright.model.norms import RMSNorm
from meshwright.parallel.initialise import ZEROS
from meshwright.parallel.tensor.linear import ColumnLinear, RowLinear
from meshwright.parallel.tensor.vocabulary import Embedding

TIMEOUT = timedelta(seconds=300)


def on_ranks(world: int, case: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `case(*args)` on so many ranks of one thread, and return what each returned."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank, args=(world, rank, folder, theirs, case, args), daemon=True)
            process.start()
            pipes.append(ours)
            processes.append(process)
        answers = [pipe.recv() for pipe in pipes]
        for process in processes:
            process.join()
    return answers


def _rank(world: int, rank: int, folder: str, pipe: Any, case: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    pipe.send(case(*args))
    os._exit(0)


def spread(values: list[float], digits: int = 3) -> str:
    """Return the median and the quartiles."""
    low, _, high = statistics.quantiles(values, n=4)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def bytes_table() -> None:
    """Print what is sent and what the textbook says."""
    from rank_pool import run_mesh
    from traffic_cases import LAYOUTS, traffic_of_a_step

    from meshwright.launcher.build import sizes_of

    print("| layout | axis, operation | bytes sent by rank 0 in a step | textbook |\n|---|---|---|---|")
    for name, (drawn, textbook) in LAYOUTS.items():
        sent = run_mesh(sizes_of(drawn.run_file(), drawn.world), traffic_of_a_step, drawn)[0]
        for key, count in sorted(sent.items()):
            print(f"| {name} | {key[0]} {key[1]} | {count:,} | {textbook(0)[key]:,} |")


class PlainMlp(nn.Module):
    """A gated feed-forward as anybody would write it."""

    def __init__(self, hidden: int, inner: int) -> None:
        """Take the widths."""
        super().__init__()
        self.gate = nn.Linear(hidden, inner, bias=False)
        self.up = nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply, gate, multiply."""
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def pairs(hidden: int, inner: int) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Return our layers and plain ones of the same sizes."""
    return {
        "ColumnLinear / nn.Linear": (
            ColumnLinear(hidden, inner, rule=ZEROS, bias=True),
            nn.Linear(hidden, inner),
        ),
        "RowLinear / nn.Linear": (RowLinear(inner, hidden, rule=ZEROS, bias=True), nn.Linear(inner, hidden)),
        "Embedding / nn.Embedding": (Embedding(1000, hidden), nn.Embedding(1000, hidden)),
        "RMSNorm / nn.RMSNorm": (RMSNorm(hidden, 1e-6), nn.RMSNorm(hidden, 1e-6)),
        "Mlp / the same of nn.Linear": (Mlp(hidden, inner), PlainMlp(hidden, inner)),
    }


def overhead_table(turns: int) -> None:
    """Print the CPU time of our layers over that of plain ones."""
    torch.set_num_threads(1)
    print("| layer | tokens x width | CPU time, ours / plain: median (quartiles) | ours, ms |\n|---|---|---|---|")
    for tokens, hidden in ((64, 64), (512, 256)):
        for name, (ours, plain) in pairs(hidden, 3 * hidden).items():
            width = 3 * hidden if name.startswith("Row") else hidden
            x = torch.randn(tokens, 1, width, requires_grad=True)
            given = torch.randint(0, 1000, (tokens, 1)) if "Embedding" in name else x
            for module in (ours, plain):
                nn.init.normal_(next(module.parameters()))
            repeat = 40 if hidden == 64 else 8
            taken = [(cpu_of(ours, given, repeat), cpu_of(plain, given, repeat)) for _ in range(turns + 2)][2:]
            ratios = [mine / theirs for mine, theirs in taken]
            each = statistics.median(mine for mine, _ in taken) / repeat * 1e3
            print(f"| {name} | {tokens} x {hidden} | {spread(ratios)} | {each:.3f} |", flush=True)


def cpu_of(module: nn.Module, given: torch.Tensor, repeat: int) -> float:
    """Return the CPU seconds of so many passes forward and backward."""
    began = time.process_time()
    for _ in range(repeat):
        module(given).sum().backward()
    return time.process_time() - began


def ranks_table(turns: int, width: int) -> None:
    """Print how much of two cores each layout uses, against one process on both."""
    print("| layout | steps/s of the wall, over one process on 2 threads | CPU s a step, all ranks |\n|---|---|---|")
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in LAYOUTS_OF_TWO}
    for _ in range(turns):
        for name, world in LAYOUTS_OF_TWO.items():
            taken = on_ranks(world, time_layout, name, width)
            rows[name].append((max(wall for wall, _ in taken), sum(cpu for _, cpu in taken)))
    for name, taken in rows.items():
        base = "one process, MoE" if "MoE" in name else "one process"
        speed = [one[0] / this[0] for one, this in zip(rows[base], taken, strict=True)]
        print(f"| {name} | {spread(speed, 2)} | {spread([cpu for _, cpu in taken], 2)} |", flush=True)


def zero_table(turns: int, width: int) -> None:
    """Print the time of a step under each way of data parallelism."""
    print("| way, 2 ranks | wall s a step | CPU s a step | CPU over that of ZeRO-1 |\n|---|---|---|---|")
    taken = on_ranks(2, time_contestants, turns, width)[0]
    ours = taken[CONTESTANTS[0]]
    for name, rows in taken.items():
        ratio = [cpu / base for (_, cpu), (_, base) in zip(rows, ours, strict=True)]
        print(f"| {name} | {spread([w for w, _ in rows])} | {spread([c for _, c in rows])} | {spread(ratio)} |")


def sums_table(turns: int) -> None:
    """Print what a reduce-scatter takes on CPU ranks, by size."""
    print("| ranks | numbers (fp32) | gloo's, ms | ours, ms | gloo's / ours | all-reduce, ms |")
    print("|---|---|---|---|---|---|")
    for world in (2, 4):
        found = on_ranks(world, time_reduce_scatters, turns, (1 << 14, 1 << 18, 1 << 22, 14 << 20))[0]
        for size, taken in found.items():
            ratios = [theirs / mine for theirs, mine in zip(taken["gloo"], taken["ours"], strict=True)]
            gloo, ours, whole = (1e3 * statistics.median(taken[name]) for name in ("gloo", "ours", "all-reduce"))
            print(f"| {world} | {size:,} | {gloo:.1f} | {ours:.1f} | {spread(ratios, 1)} | {whole:.1f} |", flush=True)


def peak_table() -> None:
    """Print how many bytes of gradients live at once on rank 0, and what `check` counts."""
    from gradient_bytes import most_in_a_step
    from parity_samples import sample
    from rank_pool import run_mesh

    from meshwright.launcher.build import sizes_of

    print("| layout | weights, bytes | gradients at most, bytes | in weights | as `check` counts |")
    print("|---|---|---|---|---|")
    drawn = [sample("dense-deep", dp_shard=2, zero__stage=stage) for stage in range(4)]
    drawn += [
        sample("dense-deep", pp=2, dp_shard=2, zero__stage=stage, pipeline__schedule="gpipe") for stage in range(4)
    ]
    drawn += [
        sample("dense-deep", pp=2, dp_shard=2, zero__stage=stage, pipeline__schedule=schedule)
        for schedule in ("1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev")
        for stage in (1, 2)
    ]
    for each in drawn:
        assert each.problems() == [], f"{each}: {each.problems()}"
        found = run_mesh(sizes_of(each.run_file(), each.world), most_in_a_step, each)[0]
        counts = f"{found.weights:,} | {found.gradients:,} | {found.gradients / found.weights:.2f}"
        print(f"| {each} | {counts} | {found.counted.gradients:,.0f} |", flush=True)


def start_again_with(memory: str) -> None:
    """Start this process again where glibc was told otherwise: it listens only when a process starts."""
    environment = environment_with(kept=memory == "kept")
    if environment != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def main() -> None:
    """Print the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["bytes", "overhead", "ranks", "zero", "sums", "peak"])
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--memory", choices=["kept", "usual"], default="kept")
    asked = parser.parse_args()
    start_again_with(asked.memory)
    if asked.width <= 0 or asked.width % 128:
        parser.error(
            f"--width {asked.width}: must be a multiple of 128, for two ranks with as many key heads of 32 each"
        )
    tables: dict[str, Callable[[], None]] = {
        "bytes": bytes_table,
        "overhead": lambda: overhead_table(4 * asked.turns),
        "ranks": lambda: ranks_table(asked.turns, asked.width),
        "zero": lambda: zero_table(asked.turns, asked.width),
        "sums": lambda: sums_table(4 * asked.turns),
        "peak": peak_table,
    }
    for part in asked.parts:
        made = f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, load {os.getloadavg()[0]:.1f}"
        how = f", width {asked.width}" if part in ("ranks", "zero") else ""
        how += f", memory {asked.memory}" if part in ("ranks", "zero", "sums") else ""
        print(f"\n### {part}{how}; {made}\n")
        tables[part]()


if __name__ == "__main__":
    main()
