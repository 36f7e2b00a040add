"""Who generates: ours and transformers, one prompt and the tokens after it from the cache, the likeliest each time.

A step is a prompt and `new_tokens` tokens after it, for one sample, as users call it: `generate` of each. Each token is
stamped when it is there; what goes to the parent in place of a loss is the time of the prompt, the median time of a
token, the bytes of the state that ours carries, and the tokens, which are the same for both.
"""

import statistics
import time
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from cpu_task import Channel, Task, batches


def their_changes(task: Task) -> dict[str, Any]:
    """Return what differs from the exported configuration where it is the peer's own choice."""
    changes: dict[str, Any] = {"dtype": "float32"}
    if task.work == "train":
        changes["use_cache"] = False
    if "E" in task.kinds:
        changes["output_router_logits"] = task.work == "train"
    if "M" in task.kinds:
        changes["mamba_chunk_size" if task.shape == "hybrid" else "chunk_size"] = task.peer_chunk_size
    return changes


def decode_by_us(task: Task, channel: Channel) -> None:
    """Generate as `meshwright generate` does, under the kernels of `meshwright train`."""
    import torch

    from meshwright.data.store import TokenStore
    from meshwright.kernels.choose import use
    from meshwright.kernels.measure import measure
    from meshwright.launcher.build import build_run
    from meshwright.launcher.runfile.read import read_run_file
    from meshwright.model.generation.generate import generate
    from meshwright.model.generation.sampling import Sampling
    from meshwright.parallel.mesh import single_process_mesh

    channel.loaded()
    run_file = read_run_file(Path(task.folder, f"{task.shape}.toml"), [])
    run = build_run(run_file, TokenStore.open(run_file.data.store), single_process_mesh(), torch.device("cpu"))
    model = run.model.eval()
    measured = measure()
    use(measured.choices)
    prompt = _prompt(task)
    state_mib = _bytes_of(model.initial_state(1, task.prompt + task.new_tokens)) / 2**20
    channel.ready(measured.reasons)
    found: dict[str, Any] = {}
    while True:
        channel.next_step(lambda: found)  # noqa: B023
        stamps, tokens = [time.perf_counter()], []
        for token in generate(model, prompt.t(), task.new_tokens, sampling=Sampling(temperature=0.0)):
            tokens.append(int(token))
            stamps.append(time.perf_counter())
        found = _found(stamps, tokens) | {"state_mib": state_mib}


def decode_by_transformers(task: Task, channel: Channel) -> None:
    """Call `generate` of transformers with its cache."""
    import torch
    from transformers import AutoModelForCausalLM

    channel.loaded()
    model = AutoModelForCausalLM.from_pretrained(Path(task.folder, task.shape), **their_changes(task)).eval()
    prompt = _prompt(task)
    channel.ready([])
    found: dict[str, Any] = {}
    how = {"max_new_tokens": task.new_tokens, "do_sample": False, "use_cache": True, "eos_token_id": None}
    while True:
        channel.next_step(lambda: found)  # noqa: B023
        stamps = _Stamps()
        with torch.no_grad():
            given = model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=stamps, **how)
        found = _found(stamps.times, given[0, task.prompt :].tolist())


class _Stamps:
    """A streamer of transformers that keeps when each token came; it is given the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _found(stamps: list[float], tokens: list[int]) -> dict[str, Any]:
    gaps = [after - before for before, after in pairwise(stamps[1:])]
    return {"prompt_s": stamps[1] - stamps[0], "token_s": statistics.median(gaps), "tokens": tokens}


def _prompt(task: Task) -> Any:
    length = task.prompt
    return next(batches(Task(**(vars(task) | {"seq_len": length, "batch": 1}))))[:, :length].contiguous()


def _bytes_of(state: Any) -> int:
    """Return the bytes of all tensors that a state is made of."""
    if hasattr(state, "untyped_storage"):
        return int(state.untyped_storage().nbytes())
    if is_dataclass(state):
        return sum(_bytes_of(getattr(state, field.name)) for field in fields(state))
    if isinstance(state, dict):
        return sum(_bytes_of(each) for each in state.values())
    if isinstance(state, (list, tuple)):
        return sum(_bytes_of(each) for each in state)
    return sum(_bytes_of(each) for each in vars(state).values()) if hasattr(state, "__dict__") else 0
