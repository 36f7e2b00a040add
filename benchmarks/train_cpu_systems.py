"""One competitor of `train_cpu.py` in a process of its own: trains so many steps whenever its parent says so.

    python benchmarks/train_cpu_systems.py SYSTEM TASK        TASK: a JSON object, see `Task`

The parent writes {"run": 3} to stdin; the answer on stdout is one JSON line with the seconds of each of the three
steps, the process's CPU seconds, page faults and the last loss. Whatever a system prints goes to stderr. This file is
run by other environments too (litgpt's), so it imports only what its system needs. Every system reads the same tokens.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Task:
    """What is trained: sizes, precision, and where the tokens lie."""

    shape: str
    precision: str
    threads: int
    folder: str
    num_layers: int = 8
    hidden_size: int = 384
    num_heads: int = 6
    ffn_hidden_size: int = 1024
    vocab_size: int = 8192
    seq_len: int = 512
    batch: int = 8
    num_experts: int = 8
    top_k: int = 2
    expert_hidden_size: int = 512
    learning_rate: float = 1e-3

    @property
    def is_moe(self) -> bool:
        """Say whether the feed-forwards are mixtures of experts."""
        return self.shape == "moe"

    @property
    def multiplied_weights(self) -> int:
        """Return how many weights of the layers and the head one token is multiplied with."""
        h = self.hidden_size
        width = self.top_k * self.expert_hidden_size if self.is_moe else self.ffn_hidden_size
        router = self.num_experts * h if self.is_moe else 0
        return self.num_layers * (4 * h * h + 3 * h * width + router) + self.vocab_size * h

    @property
    def flops_per_token(self) -> float:
        """Return the multiplications and additions of forward and backward, scores counted where they are causal."""
        return 6.0 * self.multiplied_weights + 6.0 * self.num_layers * self.seq_len * self.hidden_size


class Channel:
    """The parent's orders, and the answers to them; a system calls `next_step` before each step."""

    def __init__(self) -> None:
        """Keep stdout for the answers, and send everything else that is printed to stderr."""
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._left = 0
        self._seconds: list[float] = []
        self._loss: Callable[[], float] = lambda: float("nan")
        self._answers = 0

    def ready(self, about: list[str]) -> None:
        """Say that orders are taken, and what there is to say about how this system runs."""
        self._say({"ready": True, "about": about})

    def next_step(self, loss: Callable[[], float]) -> None:
        """End the step before this one; wait for an order if all that were ordered are done. May not return."""
        now, self._loss = time.perf_counter(), loss
        if self._left:
            self._seconds.append(now - self._began)
            self._left -= 1
            if not self._left:
                self._answer()
        if not self._left:
            self._left = self._order()
            self._start = _usage()
        self._began = time.perf_counter()

    def _order(self) -> int:
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        return int(json.loads(line)["run"])

    def _answer(self) -> None:
        cpu, faults = (b - a for a, b in zip(self._start, _usage(), strict=True))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        answer = {"seconds": self._seconds, "cpu_seconds": cpu, "page_faults": faults, "loss": self._loss()}
        self._say(answer | {"peak_mib": round(peak)})
        self._seconds = []

    def _say(self, what: dict[str, Any]) -> None:
        self._out.write(json.dumps(what) + "\n")
        self._out.flush()


def _usage() -> tuple[float, float]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime, float(usage.ru_minflt)


def ours(task: Task, channel: Channel) -> None:
    """Train with the real model, data and step of `meshwright train`; only logging and saving are left out."""
    import torch

    from meshwright.data.store import TokenStore
    from meshwright.kernels.choose import use
    from meshwright.kernels.measure import measure
    from meshwright.launcher.build import build_run
    from meshwright.launcher.observe.clock import StepClock
    from meshwright.launcher.runfile.read import read_run_file
    from meshwright.launcher.training.loop import batches_of
    from meshwright.launcher.training.one_step import one_step
    from meshwright.launcher.training.stopping import Signals, SpikeGuard
    from meshwright.parallel.mesh import single_process_mesh

    run_file = read_run_file(Path(task.folder, f"{task.shape}.toml"), [f"train.precision={_PRECISION[task.precision]}"])
    run = build_run(run_file, TokenStore.open(run_file.data.store), single_process_mesh(), torch.device("cpu"))
    measured = measure()
    use(measured.choices)
    batches, signals, clock = batches_of(run, 0), Signals(), StepClock(run.device)
    guard, loss, data, steps = SpikeGuard(0.0, []), float("nan"), 0.0, 0
    channel.ready(measured.reasons)
    while True:
        channel.next_step(lambda: loss)  # noqa: B023
        with clock.lap("data"):
            batch = next(batches)
        loss = one_step(run, batch, steps, task.learning_rate, guard=guard, signals=signals, clock=clock).loss
        laps, steps = clock.finish(), steps + 1
        data += laps.data
        print(f"step {steps}: loss {loss:.4f}, waited {1e3 * laps.data:.2f} ms for data", file=sys.stderr)


_PRECISION = {"fp32": "fp32", "bf16": "bf16_autocast"}


def transformers(task: Task, channel: Channel) -> None:
    """Train Hugging Face's Llama or Qwen3Moe in the loop that its users write: autocast, clip, fused AdamW."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    common: dict[str, Any] = {
        "vocab_size": task.vocab_size,
        "hidden_size": task.hidden_size,
        "num_hidden_layers": task.num_layers,
        "num_attention_heads": task.num_heads,
        "num_key_value_heads": task.num_heads,
        "head_dim": task.hidden_size // task.num_heads,
        "max_position_embeddings": task.seq_len,
        "tie_word_embeddings": False,
        "use_cache": False,
    }
    model: torch.nn.Module
    if task.is_moe:
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **common,
                num_experts=task.num_experts,
                num_experts_per_tok=task.top_k,
                moe_intermediate_size=task.expert_hidden_size,
                norm_topk_prob=True,
                output_router_logits=True,
            )
        )
    else:
        model = LlamaForCausalLM(LlamaConfig(**common, intermediate_size=task.ffn_hidden_size))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.learning_rate, weight_decay=0.1, fused=True)
    channel.ready([])
    loss = torch.zeros(())
    for tokens in _batches(task):
        channel.next_step(lambda: float(loss))  # noqa: B023
        inputs = tokens[:, :-1].contiguous()
        with torch.autocast("cpu", torch.bfloat16, enabled=task.precision == "bf16"):
            loss = model(input_ids=inputs, labels=inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = loss.detach()
        loss.item()  # a loop that logs


def litgpt(task: Task, channel: Channel) -> None:
    """Run `litgpt.pretrain.setup` as it is; its data module waits for the orders."""
    import torch
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.data import DataModule
    from litgpt.model import Config
    from litgpt.pretrain import setup
    from torch.utils.data import DataLoader, IterableDataset

    class Ordered(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[torch.Tensor]:
            for tokens in _batches(task):
                channel.next_step(lambda: float("nan"))
                yield tokens

    class Tokens(DataModule):
        def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
            pass

        def train_dataloader(self) -> Any:
            return DataLoader(Ordered(), batch_size=None)

        def val_dataloader(self) -> Any:
            return DataLoader([next(iter(_batches(task)))], batch_size=None)

    config = Config(
        name="bench",
        block_size=task.seq_len,
        n_layer=task.num_layers,
        n_embd=task.hidden_size,
        n_head=task.num_heads,
        padded_vocab_size=task.vocab_size,
        vocab_size=task.vocab_size,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        intermediate_size=task.ffn_hidden_size,
    )
    train = TrainArgs(
        save_interval=None,
        log_interval=1,
        global_batch_size=task.batch,
        micro_batch_size=task.batch,
        max_tokens=10**9,
        max_norm=1.0,
        lr_warmup_steps=1,
        tie_embeddings=False,
    )
    precision = {"fp32": "32-true", "bf16": "bf16-mixed"}[task.precision]
    channel.ready([])
    setup(
        "bench",
        model_config=config,
        out_dir=Path(task.folder, f"litgpt-{os.getpid()}"),
        precision=precision,
        data=Tokens(),
        train=train,
        eval=EvalArgs(interval=10**9, max_iters=1),
        devices=1,
        logger_name="csv",
    )


def ceiling(task: Task, channel: Channel) -> None:
    """Multiply and nothing else: the shapes of one step, by one library after the other; a step is one pass each.

    The rates, in GFLOP/s over all shapes, go to the parent in place of a loss.
    """
    import torch
    import torch.nn.functional as F

    from meshwright.kernels.products import onednn_product

    h, rows = task.hidden_size, task.seq_len * task.batch
    ffn = task.expert_hidden_size if task.is_moe else task.ffn_hidden_size
    sizes = [(rows, h, h), (rows, h, ffn), (rows, ffn, h), (rows // 4, h, task.vocab_size)]
    inputs = [(torch.randn(t, i), torch.randn(o, i)) for t, i, o in sizes]
    narrow = [(x.to(torch.bfloat16), w.to(torch.bfloat16)) for x, w in inputs]
    work = {
        "fp32 MKL": lambda: [F.linear(x, w) for x, w in inputs],
        "fp32 oneDNN": lambda: [onednn_product(x, w) for x, w in inputs],
        "bf16": lambda: [F.linear(x, w) for x, w in narrow],
    }
    flops = sum(2.0 * t * i * o for t, i, o in sizes)
    rates: dict[str, float] = {}
    channel.ready([])
    while True:
        channel.next_step(lambda: rates)  # type: ignore[arg-type, return-value]
        for name, run in work.items():
            began = time.perf_counter()
            with torch.no_grad():
                run()
            rates[name] = max(rates.get(name, 0.0), flops / (time.perf_counter() - began) / 1e9)


def _batches(task: Task) -> Iterator[Any]:
    """Yield [batch, seq_len + 1] tokens, forever."""
    import numpy as np
    import torch

    tokens = np.load(Path(task.folder, "tokens.npy"), mmap_mode="r")
    length, at = task.seq_len + 1, 0
    while True:
        if (at + task.batch) * length > len(tokens):
            at = 0
        part = tokens[at * length : (at + task.batch) * length]
        yield torch.from_numpy(part.astype(np.int64)).view(task.batch, length)
        at += task.batch


SYSTEMS: dict[str, Callable[[Task, Channel], None]] = {
    "ours": ours,
    "transformers": transformers,
    "litgpt": litgpt,
    "ceiling": ceiling,
}


def main() -> None:
    """Train as the parent orders, until it closes stdin."""
    channel = Channel()
    task = Task(**json.loads(sys.argv[2]))
    import torch

    torch.set_num_threads(task.threads)
    torch.manual_seed(0)
    SYSTEMS[sys.argv[1]](task, channel)


if __name__ == "__main__":
    main()
