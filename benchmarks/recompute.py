"""Time and kept bytes of every way to recompute: `python benchmarks/recompute.py --out docs/measured/recompute.md`.

One process trains one micro-batch of a dense and of an MoE model in each way, in turns. CPU seconds are those of the
process on one thread; a ratio is taken within a turn. Bytes are of the storages that the forward pass made and that are
alive before the backward pass begins, without weights: what autograd, selective recompute and `Where` hold on the
device, and the copies on the host. On a CPU both are the same memory; the copies cost what copying memory costs.
"""

import argparse
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from storages import Storages
from torch import Tensor

from meshwright.launcher.build import recompute_of
from meshwright.model.config import ModelConfig
from meshwright.model.kinds.feedforward.moe import MoeConfig
from meshwright.model.parts import build_model
from meshwright.model.stack import LanguageModel
from meshwright.parallel.config import RecomputeConfig
from meshwright.parallel.recompute.kept import Kept
from meshwright.parallel.recompute.policy import Recompute, keep_less
from meshwright.parallel.tally import Tally, declared_entries

VOCAB = 512


def modules(*keys: str, offload: bool = False) -> Recompute:
    """Return what `[recompute] mode = "modules"` with these modules asks for."""
    return recompute_of(RecomputeConfig(mode="modules", modules=keys, offload=offload))  # type: ignore[arg-type]


WAYS = {
    "none": Recompute(),
    "modules: norm, activation": modules("norm", "activation"),
    "modules: norm, mixer": modules("norm", "mixer"),
    "modules: norm, feedforward": modules("norm", "feedforward"),
    "modules: experts": modules("experts"),
    "selective: attention, matmul": Recompute("selective", save=("attention", "matmul")),
    "selective: attention": Recompute("selective", save=("attention",)),
    "full, every 2nd": Recompute("full", every=2),
    "full": Recompute("full"),
    "none, offload": Recompute(offload=True),
    "modules: norm, activation, offload": modules("norm", "activation", offload=True),
    "full, offload": Recompute("full", offload=True),
}


class Contestant:
    """One model that keeps what one way says."""

    def __init__(self, config: ModelConfig, how: Recompute, tokens: Tensor) -> None:
        """Build it; all begin with the same weights."""
        self.model: LanguageModel = build_model(config)
        self.tally = Tally(declared_entries(self.model))
        self.kept: Kept | None = keep_less(list(self.model.layers.values()), self.tally, how, torch.device("cpu"))
        self.tokens = tokens

    def forward(self) -> Tensor:
        """Return the loss of the batch."""
        loss: Tensor = self.model(self.tokens, self.tokens, None, self.tally)
        return loss

    def seconds(self) -> float:
        """Return the CPU seconds of a forward and a backward pass."""
        begin = time.process_time()
        self.forward().backward()
        return time.process_time() - begin

    def held(self) -> tuple[int, int]:
        """Return the bytes on the device and on the host between the passes."""
        weights = {parameter.untyped_storage()._cdata for parameter in self.model.parameters()}
        with Storages() as storages:
            loss = self.forward()
        on_host = self.kept.host.nbytes if self.kept is not None and self.kept.host is not None else 0
        on_device = storages.alive(weights) - on_host
        loss.backward()
        return on_device, on_host


def table(config: ModelConfig, tokens: Tensor, rounds: int) -> list[str]:
    """Return the rows of one model's table, after checking that every way computes the same gradients."""
    ways = {way: how for way, how in WAYS.items() if config.moe is not None or "experts" not in way}
    contestants = {way: Contestant(config, how, tokens) for way, how in ways.items()}
    held = {way: contestant.held() for way, contestant in contestants.items()}
    for way, contestant in contestants.items():
        pairs = zip(contestant.model.parameters(), contestants["none"].model.parameters(), strict=True)
        assert all(torch.equal(ours.grad, theirs.grad) for ours, theirs in pairs), way  # type: ignore[arg-type]
    turns = [{way: contestant.seconds() for way, contestant in contestants.items()} for _ in range(rounds)]
    lines = ["| way | kept on the device, MiB | on the host, MiB | CPU s | CPU time / none (quartiles) |"]
    lines.append("|---|---|---|---|---|")
    for way, (on_device, on_host) in held.items():
        ratios = [turn[way] / turn["none"] for turn in turns]
        low, middle, high = quantiles(ratios, n=4)
        lines.append(
            f"| {way} | {on_device / 2**20:.1f} ({on_device / held['none'][0]:.0%}) | {on_host / 2**20:.1f}"
            f" | {median(turn[way] for turn in turns):.2f} | {middle:.2f} ({low:.2f}-{high:.2f}) |"
        )
    return lines


def main() -> None:
    """Measure both models and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    h = args.hidden_size
    sizes: dict[str, Any] = {"num_layers": args.layers, "hidden_size": h, "num_heads": h // 64, "vocab_size": VOCAB}
    moe = MoeConfig(num_experts=8, top_k=2, expert_hidden_size=h, num_shared_experts=1)
    models = {"dense": ModelConfig(pattern="*-", **sizes), "moe": ModelConfig(pattern="*E", moe=moe, **sizes)}
    tokens = torch.randint(0, VOCAB, (args.seq_len, 2), generator=torch.Generator().manual_seed(0))
    command = " ".join(["benchmarks/recompute.py", *sys.argv[1:]])
    lines = ["# Recompute and offload: time and kept bytes", ""]
    lines += [f"Made {datetime.now(UTC):%Y-%m-%d} by `{command}`.", "", *(__doc__ or "").split("\n")[2:-1], ""]
    lines += [f"torch {torch.__version__}, fp32, one thread, {args.rounds} turns; batch [{args.seq_len}, 2],"]
    lines += [f"hidden_size {h}, {args.layers} layers, load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores;"]
    lines += ["every way's gradients are bitwise those of `none`."]
    for name, config in models.items():
        lines += ["", f"### {name}", "", *table(config, tokens, args.rounds)]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
