"""Time a step of Muon: `OMP_NUM_THREADS=1 python benchmarks/muon.py --layers 4 --hidden-size 256 --rounds 9`.

One process updates the matrices of some decoder layers (q, k, v, output [h, h]; gate, up, down with 3h) from the same
gradients, the contestants in turns:

    adamw          our AdamW (torch's, fused)
    muon           our Muon, in the type that it takes on this device
    torch muon     torch.optim.Muon, adjust_lr_fn = "match_rms_adamw": products in bf16 wherever it runs
    muon in bf16   our Muon with its products in bf16: what torch's does

Two ranks (gloo, ZeRO-1: every matrix is cut in rows) then make whole matrices, work on them and take their parts back:

    shared         each rank works on half of the matrices (parallel/whole/shared_work.py)
    everyone all   each gathers all of them and computes all

Prints one JSON line for each: medians with quartiles over the rounds of wall and CPU milliseconds (of one process, or
of rank 0), after checking that the ways of one type agree.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from meshwright.kernels.matmul.newton_schulz import multiplications
from meshwright.launcher.runfile.tables import OptimizerConfig
from meshwright.launcher.training import muon as our_muon
from meshwright.launcher.training.optimizer import Optimizer
from meshwright.parallel.collectives import gather_rows
from meshwright.parallel.mesh import Mesh, Sizes, build_mesh, single_process_mesh
from meshwright.parallel.placement import Placement
from meshwright.parallel.whole.shared_work import Matrix, SharedWork
from meshwright.parallel.zero.part import Part, make_part

Rounds = dict[str, list[tuple[float, float]]]
STEPS = 5


def matrices(layers: int, hidden_size: int, device: str) -> dict[str, Tensor]:
    """Return the gradients of some layers' matrices, by the names that a model gives them."""
    h, f = hidden_size, 3 * hidden_size
    shapes = {f"mixer.part.{place}": (h, h) for place in ("q", "k", "v", "output")}
    shapes |= {"feedforward.part.gate": (f, h), "feedforward.part.up": (f, h), "feedforward.part.down": (h, f)}
    torch.manual_seed(0)
    return {
        f"layers.{n}.{name}.weight": torch.randn(shape, device=device)
        for n in range(layers)
        for name, shape in shapes.items()
    }


def plain_parts(gradients: dict[str, Tensor]) -> dict[str, Part]:
    """Return parts of one process, with their gradients."""
    parts = {}
    for name, gradient in gradients.items():
        parameter = nn.Parameter(torch.zeros_like(gradient), requires_grad=False)
        parameter.grad = gradient
        shape = tuple(gradient.shape)
        parts[name] = Part(parameter, Placement(), shape, (0,) * len(shape), is_zero_part=False, split_axes=())
    return parts


def on_one_process(layers: int, hidden_size: int, rounds: int, device: str) -> Rounds:
    """Time a step of each optimizer."""
    gradients = matrices(layers, hidden_size, device)
    ways: dict[str, Callable[[], None]] = {}
    weights: dict[str, list[Tensor]] = {}
    for way, kind in {"adamw": "adamw", "muon": "muon", "muon in bf16": "muon"}.items():
        parts = plain_parts(gradients)
        optimizer = Optimizer(parts, OptimizerConfig.model_validate({"kind": kind}), single_process_mesh())
        weights[way] = [part.parameter for part in parts.values()]
        ways[way] = partial(_in_bf16 if way == "muon in bf16" else _plainly, optimizer)
    theirs = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients.values()]
    for parameter, gradient in zip(theirs, gradients.values(), strict=True):
        parameter.grad = gradient
    torchs = torch.optim.Muon(theirs, lr=0.01, adjust_lr_fn="match_rms_adamw", weight_decay=0.1, momentum=0.95)
    ways["torch muon"] = torchs.step
    weights["torch muon"] = list(theirs)
    taken = in_turns(ways, rounds, device)
    for one, other in zip(weights["muon in bf16"], weights["torch muon"], strict=True):
        assert (one - other).norm() < 0.05 * other.norm(), "they do not make the same steps"
    return taken


def on_two_ranks(rank: int, folder: str, layers: int, hidden_size: int, rounds: int) -> None:
    """Time dividing the work against everyone computing all; rank 0 writes what it took."""
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = build_mesh(Sizes(dp_shard=2))
    parts: dict[str, Part] = {}
    for name, whole in matrices(layers, hidden_size, "cpu").items():
        piece = whole.chunk(2)[rank].contiguous()
        parts[name] = make_part(piece, tuple(whole.shape), Placement(), mesh, is_zero_part=True)
    held = {name: part.parameter.detach() for name, part in parts.items()}
    work = SharedWork(parts, [Matrix(name, 0) for name in parts], mesh, partial(multiplications, steps=STEPS))
    orthogonal = partial(our_muon.orthogonal, steps=STEPS)
    shared = work.on_wholes(list(held.values()), orthogonal)
    for one, other in zip(shared, _everyone_all(held, mesh), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    ways: dict[str, Callable[[], object]] = {
        "shared": lambda: work.on_wholes(list(held.values()), orthogonal),
        "everyone all": lambda: _everyone_all(held, mesh),
    }
    taken = in_turns(ways, rounds, "cpu", meet=dist.barrier)
    if rank == 0:
        with open(os.path.join(folder, "taken.json"), "w", encoding="ascii") as file:
            json.dump(taken, file)
    dist.destroy_process_group()


def _everyone_all(held: dict[str, Tensor], mesh: Mesh) -> list[Tensor]:
    """Return this rank's halves of what every rank computes of all matrices, which one collective puts together."""
    halves = gather_rows(torch.cat([piece.reshape(1, -1) for piece in held.values()], dim=1), mesh.zero)
    both = halves.split([piece.numel() for piece in held.values()], dim=1)
    wholes = [two.reshape(-1, piece.shape[1]) for two, piece in zip(both, held.values(), strict=True)]
    return [whole.chunk(2)[mesh.zero.rank].clone() for whole in our_muon.orthogonal(wholes, STEPS)]


def in_turns(
    ways: dict[str, Callable[[], object]], rounds: int, device: str, meet: Callable[[], object] = lambda: None
) -> Rounds:
    """Run every way once in each round, after two that are not counted; return wall and CPU milliseconds."""
    taken: Rounds = {way: [] for way in ways}
    for number in range(-2, rounds):
        for way, run in ways.items():
            meet()
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if number >= 0:
                taken[way].append((1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)))
    return taken


def _plainly(optimizer: Optimizer) -> None:
    optimizer.step(0.01)


def _in_bf16(optimizer: Optimizer) -> None:
    with patch.object(our_muon, "product_type", lambda weight: torch.bfloat16):
        optimizer.step(0.01)


def report(taken: Rounds, about: dict[str, object]) -> None:
    """Print a line for each way."""
    for way, times in taken.items():
        row: dict[str, object] = {"way": way, **about}
        for kind, values in zip(("wall_ms", "cpu_ms"), zip(*times, strict=True), strict=True):
            low, median, high = statistics.quantiles(values, n=4)
            row[kind] = [round(value, 1) for value in (median, low, high)]
        print(json.dumps(row))


def main() -> None:
    """Time both, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about: dict[str, object] = {"layers": args.layers, "hidden_size": args.hidden_size, "torch": torch.__version__}
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    load = round(os.getloadavg()[0], 1)
    taken = on_one_process(args.layers, args.hidden_size, args.rounds, device)
    report(taken, about | {"ranks": 1, "device": name, "load": load})
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(on_two_ranks, (folder, args.layers, args.hidden_size, args.rounds), nprocs=2)  # type: ignore[no-untyped-call]
        with open(os.path.join(folder, "taken.json"), encoding="ascii") as file:
            report(json.load(file), about | {"ranks": 2, "device": "cpu, gloo, 1 thread each", "load": load})


if __name__ == "__main__":
    main()
