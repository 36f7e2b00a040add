"""Time a Mamba-2 mixer by chunk length: `python benchmarks/scan.py --threads 2`, ours against transformers'.

Both mixers get the same weights and samples and are compared before either is timed; forward and backward together.
Each row comes from a process of its own, so that its peak is its own: the most resident memory above what the process
held when mixer and input were made. `kept` is what the forward pass leaves for the backward. Rows are taken in turn,
`--rounds` times, and their medians are printed, one JSON line for each. On a busy machine compare `cpu_ms`, with one
thread.

    --at-once 1 4 16      the form: how many chunks one product is made of (1 on a CPU, 16 on a GPU)
    --products            the type: the scan's products by themselves in fp32 and in bf16, how long and how exact
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CHUNKS = (16, 32, 64, 128, 256)


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--state-size", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: under autocast")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunks", type=int, nargs="*", default=list(CHUNKS))
    parser.add_argument("--at-once", type=int, nargs="*", default=[1], help="chunks of ours in one product")
    parser.add_argument("--products", action="store_true", help="time the products of the scan by themselves")
    parser.add_argument(
        "--row", nargs=3, metavar=("WHOSE", "CHUNK", "AT_ONCE"), help="one row; the script calls itself"
    )
    return parser.parse_args()


def ours(args: argparse.Namespace, chunk: int) -> Any:
    """Return our mixer as a function of x, its weights drawn by transformers' (`theirs`)."""
    import torch

    from meshwright.model.mixers.mamba2 import Mamba2, Mamba2Sizes
    from meshwright.parallel.where import where_of_plain_tokens

    heads = 2 * args.hidden_size // args.head_dim
    mixer = Mamba2(args.hidden_size, Mamba2Sizes(heads, args.head_dim, 1, args.state_size, 4, chunk))
    source = theirs_module(args, chunk)
    columns = [mixer.z.weight, mixer.x.weight, mixer.B.weight, mixer.C.weight, mixer.dt.weight]
    convs = [mixer.conv_x, mixer.conv_B, mixer.conv_C]
    fused = {
        "in_proj.weight": columns,
        "conv1d.weight": [conv.weight for conv in convs],
        "conv1d.bias": [conv.bias for conv in convs],
        "out_proj.weight": [mixer.output.weight],
        "norm.weight": [mixer.norm.weight],
        "A_log": [mixer.A_log],
        "D": [mixer.D],
        "dt_bias": [mixer.dt_bias],
    }
    with torch.no_grad():
        for name, parts in fused.items():
            whole = source.get_parameter(name)
            for mine, its in zip(parts, whole.split([part.shape[0] for part in parts]), strict=True):
                mine.copy_(its.view(mine.shape))
    where = where_of_plain_tokens(torch.zeros(args.seq_len, args.batch, dtype=torch.int64))
    return lambda x: mixer(x.transpose(0, 1), where, None).transpose(0, 1)


def theirs_module(args: argparse.Namespace, chunk: int) -> Any:
    """Return transformers' mixer."""
    import torch
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    torch.manual_seed(0)
    config = Mamba2Config(
        hidden_size=args.hidden_size,
        num_heads=2 * args.hidden_size // args.head_dim,
        head_dim=args.head_dim,
        n_groups=1,
        state_size=args.state_size,
        chunk_size=chunk,
        num_hidden_layers=1,
    )
    return Mamba2Mixer(config, layer_idx=0)


def several_at_once(at_once: int) -> None:
    """Let the scan of this process make its products of so many chunks at once."""
    from meshwright.kernels.states import ssd

    usual = ssd.chunked_ssd
    ssd.chunked_ssd = lambda *given: usual(*given[:-1], at_once)  # type: ignore[assignment]


def products(args: argparse.Namespace) -> None:
    """Print what the products of one chunk cost in fp32 and in bf16, and how far the second is from the first."""
    import torch

    torch.set_num_threads(args.threads)
    heads = 2 * args.hidden_size // args.head_dim
    for chunk in args.chunks:
        generator = torch.Generator().manual_seed(0)
        of_group = torch.randn(2, args.batch, chunk, args.state_size, generator=generator)
        of_heads = torch.randn(args.batch * heads, chunk, chunk, generator=generator)
        u = torch.randn(args.batch * heads, chunk, args.head_dim, generator=generator)
        wide = torch.randn(args.batch, args.state_size, heads * args.head_dim, generator=generator)
        pairs = {"C B^T": (of_group[0], of_group[1].transpose(1, 2)), "M u": (of_heads, u), "C h": (of_group[0], wide)}
        for name, (a, b) in pairs.items():
            row: dict[str, object] = {"product": name, "chunk": chunk, "threads": args.threads}
            for dtype in (torch.float32, torch.bfloat16):
                x, y = a.to(dtype), b.to(dtype)
                torch.bmm(x, y)
                times = []
                for _ in range(50):
                    begin = time.perf_counter()
                    found = torch.bmm(x, y)
                    times.append(time.perf_counter() - begin)
                row[f"{dtype} us".removeprefix("torch.")] = round(statistics.median(times) * 1e6, 1)
            exact = torch.bmm(a, b)
            row["bf16 error"] = f"{((found.float() - exact).norm() / exact.norm()).item():.1e}"
            print(json.dumps(row))


def measure(args: argparse.Namespace, whose: str, chunk: int, at_once: int) -> dict[str, float]:
    """Time one mixer in this process, and say how much memory it took."""
    import torch

    torch.set_num_threads(args.threads)
    if whose == "ours" and at_once > 1:
        several_at_once(at_once)
    mixer = ours(args, chunk) if whose == "ours" else theirs_module(args, chunk)
    x = torch.randn(args.batch, args.seq_len, args.hidden_size, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    kept: dict[int, int] = {}

    def keep(saved: Any) -> Any:
        storage = saved.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return saved

    def once() -> tuple[float, float]:
        begin = time.perf_counter(), time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bf16"):
            y = mixer(x)
        y.square().sum().backward()
        return time.perf_counter() - begin[0], time.process_time() - begin[1]

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    once()
    times = [once() for _ in range(args.repeats)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    held = []  # so that no storage's address is used twice
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (held.append(t), keep(t))[1], lambda t: t)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bf16"):
        y = mixer(x)
    return {
        "ms": statistics.median(wall for wall, _ in times) * 1e3,
        "cpu_ms": statistics.median(cpu for _, cpu in times) * 1e3,
        "peak_mib": peak / 1024,
        "kept_mib": sum(kept.values()) / 2**20,
        "checksum": y.detach().float().square().mean().sqrt().item(),
    }


def in_own_process(args: argparse.Namespace, whose: str, chunk: int, at_once: int) -> dict[str, float]:
    """Measure one row in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--row", whose, str(chunk), str(at_once)]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure every row in turn, or the one that was asked for."""
    args = options()
    if args.row:
        whose, chunk, at_once = args.row
        print(json.dumps(measure(args, whose, int(chunk), int(at_once))))
        return
    if args.products:
        products(args)
        return
    contestants = [("transformers", 1), *(("ours", at_once) for at_once in args.at_once)]
    rows: dict[tuple[str, int, int], list[dict[str, float]]] = {}
    for _ in range(args.rounds):
        for chunk in args.chunks:
            for whose, at_once in contestants:
                found = in_own_process(args, whose, chunk, at_once)
                rows.setdefault((whose, chunk, at_once), []).append(found)
    bound = 1e-4 if args.dtype == "fp32" else 2e-2
    sums = [one["checksum"] for each in rows.values() for one in each]
    if max(sums) - min(sums) > bound * max(sums):
        raise SystemExit(f"the mixers differ: root mean squares from {min(sums)} to {max(sums)}")
    for (whose, chunk, at_once), of_row in rows.items():
        times = sorted(each["ms"] for each in of_row)
        row: dict[str, object] = {
            "mixer": whose,
            "chunk": chunk,
            "at_once": at_once,
            "dtype": args.dtype,
            "threads": args.threads,
        }
        row |= {
            "ms": round(statistics.median(times), 1),
            "ms_lowest": round(times[0], 1),
            "ms_highest": round(times[-1], 1),
        }
        row |= {
            key: round(statistics.median(each[key] for each in of_row), 1) for key in ("cpu_ms", "peak_mib", "kept_mib")
        }
        row |= {"load": round(os.getloadavg()[0], 1)}
        print(json.dumps(row))


if __name__ == "__main__":
    main()
