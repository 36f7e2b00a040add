"""One competitor of `train_cpu.py` in a process of its own: trains so many steps whenever its parent says so.

    python benchmarks/train_cpu_systems.py SYSTEM TASK        TASK: a JSON object, see `cpu_task.py`

The parent writes {"run": 3} to stdin; the answer on stdout is one JSON line with the seconds of each of the three
steps, the process's CPU seconds, page faults and the last loss. Whatever a system prints goes to stderr. This file is
run by other environments too (litgpt's), so it imports only what its system needs. Every system reads the same tokens.
What generates instead stands in `decode_cpu_systems.py`.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cpu_task import Channel, Task, batches
from decode_cpu_systems import decode_by_transformers, decode_by_us, their_changes


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

    channel.loaded()
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
    """Train Hugging Face's class of this shape in the loop that its users write: autocast, clip, fused AdamW."""
    import torch
    from transformers import AutoModelForCausalLM

    channel.loaded()
    model = AutoModelForCausalLM.from_pretrained(Path(task.folder, task.shape), **their_changes(task))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.learning_rate, weight_decay=0.1, fused=True)
    channel.ready([])
    loss = torch.zeros(())
    for tokens in batches(task):
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

    channel.loaded()

    class Ordered(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[torch.Tensor]:
            for tokens in batches(task):
                channel.next_step(lambda: float("nan"))
                yield tokens

    class Tokens(DataModule):
        def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
            pass

        def train_dataloader(self) -> Any:
            return DataLoader(Ordered(), batch_size=None)

        def val_dataloader(self) -> Any:
            return DataLoader([next(iter(batches(task)))], batch_size=None)

    config = Config(
        name="bench",
        block_size=task.seq_len,
        n_layer=task.num_layers,
        n_embd=task.hidden_size,
        n_head=task.hidden_size // task.head_dim,
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

    from meshwright.kernels.matmul.products import onednn_product

    rows = task.seq_len * task.batch
    # The head comes by chunks of tokens, in ours too.
    sizes = [(rows if o < task.vocab_size else rows // 4, i, o) for i, o in dict.fromkeys(task.products)]
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


SYSTEMS: dict[tuple[str, str], Callable[[Task, Channel], None]] = {
    ("train", "ours"): ours,
    ("train", "transformers"): transformers,
    ("train", "litgpt"): litgpt,
    ("train", "ceiling"): ceiling,
    ("decode", "ours"): decode_by_us,
    ("decode", "transformers"): decode_by_transformers,
}


def main() -> None:
    """Train as the parent orders, until it closes stdin."""
    channel = Channel()
    task = Task(**json.loads(sys.argv[2]))
    import torch

    torch.set_num_threads(task.threads)
    torch.manual_seed(0)
    SYSTEMS[task.work, sys.argv[1]](task, channel)


if __name__ == "__main__":
    main()
