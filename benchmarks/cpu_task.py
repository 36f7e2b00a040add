"""What the CPU benchmarks give a system to do, and how they talk to it; imported by other environments too (litgpt's).

dense    8 layers, hidden 384, 6 heads, SwiGLU 1024, vocabulary 8192 untied, 512 tokens, batch 8        20.5 M
moe      the same with 8 experts of width 512, top-2, on each layer                                     48.8 M
mamba    10 layers of Mamba-2, hidden 512, 16 heads of 64, state 128, vocabulary tied, batch 4          21.4 M
hybrid   the same width, 9 of Mamba-2 and 1 of attention (8 heads), SwiGLU 1024 in each, batch 4        36.5 M

train    a step is one update          decode   a step is a prompt and `new_tokens` tokens after it, batch 1
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

PATTERNS = {"dense": "*-", "moe": "*E", "mamba": "M", "hybrid": "M-M-M-M-M-*-M-M-M-M-"}
SHAPES = tuple(PATTERNS)


@dataclass(frozen=True)
class Task:
    """What is trained or generated from: sizes, precision, and where tokens and weights lie."""

    shape: str
    precision: str
    threads: int
    folder: str
    work: str = "train"
    pattern: str = ""
    """In place of the shape's own."""
    num_layers: int = 8
    hidden_size: int = 384
    head_dim: int = 64
    ffn_hidden_size: int = 1024
    tie_embeddings: bool = False
    vocab_size: int = 8192
    seq_len: int = 512
    batch: int = 8
    num_experts: int = 8
    top_k: int = 2
    expert_hidden_size: int = 512
    state_size: int = 128
    conv_kernel: int = 4
    peer_chunk_size: int = 256
    """transformers' own default."""
    prompt: int = 128
    new_tokens: int = 128
    learning_rate: float = 1e-3

    @property
    def kinds(self) -> str:
        """Return the letters of all layers' parts."""
        pattern = self.pattern or PATTERNS[self.shape]
        mixers = sum(letter in "*M" for letter in pattern)
        return (pattern * self.num_layers)[: len(pattern) * self.num_layers // mixers]

    @property
    def model_keys(self) -> dict[str, Any]:
        """Return our [model] table."""
        has_attention = "*" in self.kinds
        keys: dict[str, Any] = {
            "pattern": self.kinds,
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size,
            "tie_embeddings": self.tie_embeddings,
        }
        if has_attention:
            keys |= {"num_heads": self.hidden_size // self.head_dim, "qk_norm": "E" in self.kinds}
        if "-" in self.kinds:
            keys["ffn_hidden_size"] = self.ffn_hidden_size
        if has_attention and "M" in self.kinds:
            keys["position"] = "none"  # as Granite 4
        if "M" in self.kinds:
            keys["mamba2"] = {
                "head_dim": self.head_dim,
                "state_size": self.state_size,
                "conv_kernel": self.conv_kernel,
            }
        if "E" in self.kinds:
            keys["moe"] = {
                "num_experts": self.num_experts,
                "top_k": self.top_k,
                "expert_hidden_size": self.expert_hidden_size,
            }
        return keys

    @property
    def products(self) -> list[tuple[int, int]]:
        """Return the inputs and outputs of every weight matrix that one token is multiplied with."""
        h, c = self.hidden_size, 2 * self.hidden_size
        of_kind = {
            "*": [(h, h)] * 4,
            "-": [(h, self.ffn_hidden_size)] * 2 + [(self.ffn_hidden_size, h)],
            "E": [(h, self.num_experts)]
            + ([(h, self.expert_hidden_size)] * 2 + [(self.expert_hidden_size, h)]) * self.top_k,
            "M": [(h, c), (h, c), (h, 2 * self.state_size + c // self.head_dim), (c, h)],
        }
        return [size for letter in self.kinds for size in of_kind[letter]] + [(h, self.vocab_size)]

    @property
    def flops_per_token(self) -> float:
        """Return the multiplications and additions of forward and backward: weights, causal scores, scans."""
        scores = self.kinds.count("*") * self.seq_len * self.hidden_size
        scans = self.kinds.count("M") * 2 * self.state_size * 2 * self.hidden_size
        return 6.0 * (sum(i * o for i, o in self.products) + scores + scans)


def task_of(shape: str, precision: str, threads: int, folder: str, **changes: Any) -> Task:
    """Return the task of a shape with the sizes that stand at the head of this file."""
    wide = {"num_layers": 10, "hidden_size": 512, "tie_embeddings": True, "batch": 4}
    return Task(shape, precision, threads, folder, **(({} if shape in ("dense", "moe") else wide) | changes))


class Channel:
    """The parent's orders, and the answers to them; a system calls `next_step` before each step."""

    def __init__(self) -> None:
        """Keep stdout for the answers, and send everything else that is printed to stderr."""
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._left = 0
        self._seconds: list[float] = []
        self._loss: Callable[[], Any] = lambda: float("nan")
        self._before = 0.0

    def loaded(self) -> None:
        """Say that libraries are loaded: what memory is taken from now on is counted."""
        self._before = _peak_mib()

    def ready(self, about: list[str]) -> None:
        """Say that orders are taken, and what there is to say about how this system runs."""
        self._say({"ready": True, "about": about})

    def next_step(self, loss: Callable[[], Any]) -> None:
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
        answer = {"seconds": self._seconds, "cpu_seconds": cpu, "page_faults": faults, "loss": self._loss()}
        self._say(answer | {"peak_mib": round(_peak_mib() - self._before)})
        self._seconds = []

    def _say(self, what: dict[str, Any]) -> None:
        self._out.write(json.dumps(what) + "\n")
        self._out.flush()


def _peak_mib() -> float:
    """Return the most memory that was resident; ru_maxrss would begin with the peak of the parent that forked this."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def _usage() -> tuple[float, float]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime, float(usage.ru_minflt)


def batches(task: Task) -> Iterator[Any]:
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
