"""NCCL's rules on gloo: what would fail, hang or be wrong on GPUs fails here, by name.

On each rank, at the call (`install`):
    contiguous tensors, all on one device, of a type that NCCL has; a reduction that it has; a group that this rank
    is in; a named sender; no Python objects inside a step; at the end every result waited for
Between the ranks, from what each wrote down (`disagreements`), by whoever started them:
    the same calls in the same order with the same shapes, types, reductions and roots; an all-to-all's counts the same
    on both sides; sends that meet their receives. NCCL runs a group's calls one after the other on a stream, a batch of
    sends and receives together; what would wait there for ever is found, also where gloo goes on:

        rank 0   send to 1, receive from 1          each waits for the other to receive; as one batch
        rank 1   send to 0, receive from 0          on both sides it is right

A rank writes a line before each call, so that the ranks can be compared while they hang and after gloo ended a process.

Not seen: functional collectives and compiled graphs (counted by `missed`, and refused); a CPU tensor where a GPU's is
meant; a result that is read before it was waited for; calls of different groups that overlap in different orders.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import collective_calls
import torch
import torch.distributed as dist
from collective_calls import Call
from torch.distributed import distributed_c10d

from meshwright.parallel.tally import Tally
from meshwright.parallel.zero.engine import ZeroEngine

# torch's ncclDataType; complex tensors reach a group as pairs of real numbers.
DTYPES = {
    torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
}  # fmt: skip
REDUCTIONS = {"SUM", "PRODUCT", "MIN", "MAX", "AVG", "PREMUL_SUM"}
_write = os.write  # a test may fill up the disk
_FOLDERS_OF_TORCH = (os.path.dirname(torch.__file__), __file__, collective_calls.__file__)


class BrokenRule(AssertionError):
    """A call that gloo takes and NCCL would not."""


class _Rules:
    """One rank's rules, and its lines."""

    def __init__(self, log: Path) -> None:
        self.file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.names: dict[str, list[str]] = {}  # by group, the axes that it is the group of
        self.calls: dict[str, int] = {}
        self.ranks: dict[str, list[int]] = {}
        self.unwaited: dict[int, tuple[Any, str]] = {}
        self.in_step = self.may_call_past = False
        self.broken: list[str] = []

    def before(self, call: Call) -> None:
        """Hold a call against the rules of one rank, and write it down for those of all."""
        key = call.name
        self.calls[key] = self.calls.get(key, 0) + 1
        self.check(call)
        _write(self.file, (json.dumps(self.line(call, key)) + "\n").encode())

    def after(self, call: Call, work: Any) -> None:
        """Remember what has to be waited for."""
        if work is not None:
            self.unwaited[id(work)] = (work, self.called(call))

    def waited(self, work: Any) -> None:
        """Forget what was waited for."""
        self.unwaited.pop(id(work), None)

    def check(self, call: Call) -> None:
        tensors = [*call.inputs, *call.outputs]
        if call.op in ("recv_anysource", "monitored_barrier"):
            self.refuse(call, "NCCL has no such call")
        for tensor in tensors:
            if not tensor.is_contiguous():
                self.refuse(call, f"a tensor {list(tensor.shape)} with strides {list(tensor.stride())}: not contiguous")
            if tensor.dtype not in DTYPES:
                self.refuse(call, f"NCCL has no {tensor.dtype}")
        if len({tensor.device for tensor in tensors}) > 1:
            self.refuse(call, f"tensors on {sorted({str(tensor.device) for tensor in tensors})}: more than one device")
        if call.op == "reduce_scatter":
            (x,), (out,) = call.inputs, call.outputs
            if out.dtype != x.dtype or out.numel() * call.group.size() != x.numel():
                self.refuse(call, f"{_shape_of(x)} is summed into {_shape_of(out)}: other types, or no equal pieces")
        if call.reduce_op and call.reduce_op not in REDUCTIONS:
            self.refuse(call, f"NCCL has no reduction {call.reduce_op}")
        if call.reduce_op == "AVG" and tensors[0].dtype == torch.bool:
            self.refuse(call, "NCCL has no mean of truth values")

    def line(self, call: Call, key: str) -> dict[str, Any]:
        if key not in self.ranks:
            self.ranks[key] = dist.get_process_group_ranks(call.group)
        ranks = self.ranks[key]
        line = {"group": key, "call": self.called(call), "at": _caller()}
        if call.op in ("send", "recv"):
            assert call.peer is not None
            what = ", ".join(_shape_of(tensor) for tensor in (*call.inputs, *call.outputs))
            batch = {"batch": call.batch, "to_come": call.to_come}
            return line | batch | {"op": call.op, "peer": ranks[call.peer], "what": what, "ranks": ranks}
        return line | {"op": "all", "what": _what(call), "rows": call.rows, "ranks": ranks}

    def called(self, call: Call) -> str:
        name = "+".join(self.names.get(call.name, [])) or f"group {call.name}"
        return f"call {self.calls[call.name]} of {name}, {call.op}"

    def refuse(self, call: Call, reason: str) -> None:
        ranks = dist.get_process_group_ranks(call.group)
        self.fail(f"{self.called(call)} (ranks {ranks}): {reason}")

    def fail(self, reason: str) -> None:
        text = f"rank {dist.get_rank()}, {_caller()}: {reason}"
        self.broken.append(text)  # whoever catches it, the end of the case tells it
        raise BrokenRule(text)


_installed: list[_Rules] = []


def install(log: Path) -> None:
    """Hold every call of this process to the rules from here on; lines go to `log`."""
    rules = _Rules(log)
    _installed.append(rules)
    collective_calls.watch(rules)

    def refuse_objects(original: Callable[..., Any]) -> Callable[..., Any]:
        def convert(*args: Any, **kwargs: Any) -> Any:
            if rules.in_step:
                rules.fail("a collective of Python objects inside a step: it waits for the device and copies twice")
            return original(*args, **kwargs)

        return convert

    def refuse_outsiders(op_name: str) -> None:
        rules.fail(f"{op_name}: this rank is not in the group")

    for name in ("_object_to_tensor", "_tensor_to_object"):
        setattr(distributed_c10d, name, refuse_objects(getattr(distributed_c10d, name)))
    distributed_c10d._warn_not_in_group = refuse_outsiders
    _mark_steps(rules)


def _mark_steps(rules: _Rules) -> None:
    """Begin a step with the engine's; it ends when the weights are published or the step's sums are known."""
    ends = ((ZeroEngine, "publish_weights", False), (Tally, "reduce", False))
    for owner, name, begins in ((ZeroEngine, "start_step", True), (ZeroEngine, "start_micro_batch", True), *ends):
        if hasattr(owner, name):
            setattr(owner, name, _marked(getattr(owner, name), rules, begins=begins))


def _marked(original: Callable[..., Any], rules: _Rules, *, begins: bool) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        rules.in_step = True
        try:
            return original(*args, **kwargs)
        finally:
            rules.in_step = begins

    return call


@contextmanager
def inside_a_step(inside: bool = True) -> Iterator[None]:
    """Say that what follows belongs to a step, where no engine does, or that it does not: a test's own look at it."""
    before = [rules.in_step for rules in _installed]
    for rules in _installed:
        rules.in_step = inside
    try:
        yield
    finally:
        for rules, was in zip(_installed, before, strict=True):
            rules.in_step = was


def let_torch_call_past() -> None:
    """Say that this case lets torch's own DTensors communicate, by functional collectives that nobody sees."""
    for rules in _installed:
        rules.may_call_past = True


def name_axes(axes: dict[str, Any]) -> None:
    """Let a mesh's groups be called by the names of its axes."""
    for rules in _installed:
        rules.names = {}
        for name, axis in axes.items():
            if axis.group is not None:
                rules.names.setdefault(axis.group.group_name, []).append(name)


def begin_case() -> None:
    """Begin to count calls; nothing is left of the case before."""
    collective_calls.missed()
    for rules in _installed:
        rules.calls, rules.names, rules.unwaited, rules.broken = {}, {}, {}, []
        rules.in_step = rules.may_call_past = False


def end_case() -> None:
    """Say what a rank can only know at the end.

    Raises:
        BrokenRule: if a rule was broken and the case went on, a result was not waited for, or a call went past.
    """
    for rules in _installed:
        if rules.broken:
            raise BrokenRule("\n".join(rules.broken))
        if rules.unwaited:
            calls = sorted(text for _, text in rules.unwaited.values())
            raise BrokenRule(f"rank {dist.get_rank()}: never waited for: {'; '.join(calls)}")
        past = {"+".join(rules.names.get(name, [name])): count for name, count in collective_calls.missed().items()}
        if past and not rules.may_call_past:
            said = "gloo was called past torch.distributed (functional collectives?), by group"
            raise BrokenRule(f"rank {dist.get_rank()}: {said}: {past}")


def _shape_of(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _what(call: Call) -> str:
    """Return what must be the same on every rank."""
    if call.rows is not None:
        return f"{call.op} of {_shape_of(call.inputs[0][:0])}" if call.inputs[0].dim() else call.op
    words = [call.op, call.reduce_op, "" if call.root is None else f"root {call.root}"]
    # The lists of a gather and of a scatter stand on the root alone.
    words += [_shape_of(call.outputs[0])] if call.op == "scatter" else [*map(_shape_of, call.inputs)]
    if call.outputs is not call.inputs and call.op not in ("gather", "scatter"):
        words += ["->", *map(_shape_of, call.outputs)]
    return " ".join(word for word in words if word)


def _caller() -> str:
    """Return file:line of who called torch."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_FOLDERS_OF_TORCH):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
