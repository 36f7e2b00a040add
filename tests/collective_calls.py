"""Every collective of this process, seen at the one door that torch's Python code goes through.

    dist.all_reduce, dist.batch_isend_irecv, FSDP2, pipelining, objects, ...  ->  ProcessGroup.<method>  ->  gloo

`watch(listener)` wraps the methods of `ProcessGroup`, so that it does not matter how a caller imported its function.
On a CPU `collectives.py` makes a reduce-scatter of an all-to-all and a sum: it is told as the reduce-scatter that it is
on a GPU. What goes past: functional collectives (`torch.ops._c10d_functional`), which call the group from C++, and
whatever a compiled graph makes of them. gloo numbers every call that reaches it, so that `missed()` counts those.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from meshwright.parallel import collectives


@dataclass
class Call:
    """One call of a group: what goes in, what comes out. Of what is changed in place, the inputs are the outputs."""

    group: dist.ProcessGroup
    op: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    reduce_op: str = ""
    root: int | None = None
    peer: int | None = None
    """The other rank of a send or a receive, in the group's numbers."""
    rows: tuple[list[int], list[int]] | None = None
    """What an all-to-all sends to each rank and receives from it, in rows of dim 0."""
    batch: int | None = None
    """A number that the sends and receives of one batch share."""
    to_come: int = 0
    """How many of its batch are still to be called."""

    @property
    def name(self) -> str:
        """Return the group's name, the same on all its ranks."""
        return str(self.group.group_name)


class Listener(Protocol):
    """Whom every call is told."""

    def before(self, call: Call) -> None:
        """Hear of a call that is about to be made; what this raises, the caller gets instead."""

    def after(self, call: Call, work: Any) -> None:
        """Hear that it was made, and what is to be waited for (None: nothing)."""

    def waited(self, work: Any) -> None:
        """Hear that a result was waited for."""


Describe = Callable[..., Call]
_listeners: list[Listener] = []
_originals: list[tuple[Any, str, Any]] = []
_seen: dict[str, tuple[int, int]] = {}  # by group: gloo's count when it was last asked (a new group: 0), calls since
_sums: list[tuple[Tensor, Tensor]] = []  # the result and what is summed of a reduce-scatter that is being called
_batch = [0, 0]  # its number, and how many of its calls are to come


@contextmanager
def watching(listener: Listener) -> Iterator[None]:
    """Tell a listener of every call made inside."""
    watch(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def watch(listener: Listener) -> None:
    """Tell a listener of every call from here on."""
    if not _originals:
        for name, describe in METHODS.items():
            if hasattr(dist.ProcessGroup, name):
                _replace(dist.ProcessGroup, name, _told(getattr(dist.ProcessGroup, name), describe))
        _replace(collectives, "_exchange_pieces", _told_of_pieces(collectives._exchange_pieces))
        _replace(dist.Work, "wait", _told_of_waiting(dist.Work.wait))
        # The first thing that batch_isend_irecv does, by whatever name it was imported.
        _replace(distributed_c10d, "_check_p2p_op_list", _told_of_a_batch(distributed_c10d._check_p2p_op_list))
    _listeners.append(listener)


def missed() -> dict[str, int]:
    """Return by group how many calls reached gloo without passing here, since the last time of asking."""
    found = {}
    for group in list(distributed_c10d._world.pg_map):
        before, calls = _seen.get(group.group_name, (0, 0))
        count = group._get_sequence_number_for_group()
        if count != before + calls:
            found[str(group.group_name)] = count - before - calls
        _seen[group.group_name] = count, 0
    return found


def _replace(owner: Any, name: str, by: Any) -> None:
    _originals.append((owner, name, getattr(owner, name)))
    setattr(owner, name, by)


def _told(original: Any, describe: Describe) -> Any:
    def call_group(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        call = describe(group, *args, **kwargs)
        if _sums:
            out, x = _sums[-1]
            call = Call(group, "reduce_scatter", [x], [out], reduce_op="SUM")
        if call.op in ("send", "recv", "recv_anysource") and _batch[1]:
            _batch[1] -= 1
            call.batch, call.to_come = _batch
        for listener in _listeners:
            listener.before(call)
        before, calls = _seen.get(call.name, (0, 0))
        _seen[call.name] = before, calls + 1
        work = original(group, *args, **kwargs)
        for listener in _listeners:
            listener.after(call, work)
        return work

    return call_group


def _told_of_waiting(original: Any) -> Any:
    def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
        for listener in _listeners:
            listener.waited(work)
        return original(work, *args, **kwargs)

    return wait


def _told_of_pieces(original: Any) -> Any:
    def exchange(out: Tensor, x: Tensor, group: Any) -> Any:
        _sums.append((out, x))
        try:
            return original(out, x, group)
        finally:
            _sums.pop()

    return exchange


def _told_of_a_batch(original: Any) -> Any:
    def check(ops: Sequence[Any]) -> None:
        original(ops)
        _batch[:] = _batch[0] + 1, len(ops)

    return check


def _flat(tensors: Any) -> list[Tensor]:
    """Return the tensors of a tensor, a list, or a list of lists."""
    if isinstance(tensors, Tensor):
        return [tensors]
    return [tensor for inner in tensors for tensor in _flat(inner)]


def _reduction(opts: Any) -> str:
    """Return SUM, MAX, ... from torch's options, or from the operation itself."""
    op = getattr(opts, "reduceOp", opts)
    return str(getattr(op, "op", op)).removeprefix("RedOpType.").removeprefix("ReduceOp.")


def _in_place(op: str, *, reduces: bool) -> Describe:
    def describe(group: dist.ProcessGroup, tensors: Any, opts: Any = dist.ReduceOp.SUM, **_: Any) -> Call:
        held = _flat(tensors)
        root = getattr(opts, "rootRank", None)
        return Call(group, op, held, held, reduce_op=_reduction(opts) if reduces else "", root=root)

    return describe


def _out_of_place(op: str, *, reduces: bool = False) -> Describe:
    def describe(group: dist.ProcessGroup, out: Any, x: Any, opts: Any = dist.ReduceOp.SUM, **_: Any) -> Call:
        root = getattr(opts, "rootRank", None)
        return Call(group, op, _flat(x), _flat(out), reduce_op=_reduction(opts) if reduces else "", root=root)

    return describe


def _all_to_all(
    group: dist.ProcessGroup, out: Tensor, x: Tensor, receive: Sequence[int], send: Sequence[int], *_: Any, **__: Any
) -> Call:
    n = group.size()
    # No counts: equal pieces. A tensor without dims has no rows to send.
    rows = (list(send) or [len(x) // n] * n, list(receive) or [len(out) // n] * n)
    return Call(group, "all_to_all", [x], [out], rows=rows)


def _all_to_all_of_lists(group: dist.ProcessGroup, out: list[Tensor], x: list[Tensor], *_: Any, **__: Any) -> Call:
    rows = ([tensor.numel() for tensor in x], [tensor.numel() for tensor in out])
    return Call(group, "all_to_all", list(x), list(out), rows=rows)


def _send(group: dist.ProcessGroup, tensors: list[Tensor], peer: int, tag: int = 0) -> Call:
    return Call(group, "send", list(tensors), [], peer=peer)


def _receive(group: dist.ProcessGroup, tensors: list[Tensor], peer: int, tag: int = 0) -> Call:
    return Call(group, "recv", [], list(tensors), peer=peer)


def _receive_from_any(group: dist.ProcessGroup, tensors: list[Tensor], tag: int = 0) -> Call:
    return Call(group, "recv_anysource", [], list(tensors))


def _barrier(op: str) -> Describe:
    def describe(group: dist.ProcessGroup, *_: Any, **__: Any) -> Call:
        return Call(group, op, [], [])

    return describe


# torch 2.13 renamed some; where both names exist, the old one is another method and is seen as well.
METHODS: dict[str, Describe] = {
    "allreduce": _in_place("all_reduce", reduces=True),
    "allreduce_coalesced": _in_place("all_reduce", reduces=True),
    "broadcast": _in_place("broadcast", reduces=False),
    "reduce": _in_place("reduce", reduces=True),
    "allgather": _out_of_place("all_gather"),
    "all_gather_single": _out_of_place("all_gather"),
    "_allgather_base": _out_of_place("all_gather"),
    "all_gather_single_coalesced": _out_of_place("all_gather"),
    "allgather_into_tensor_coalesced": _out_of_place("all_gather"),
    "allgather_coalesced": _out_of_place("all_gather"),
    "gather": _out_of_place("gather"),
    "scatter": _out_of_place("scatter"),
    "reduce_scatter": _out_of_place("reduce_scatter", reduces=True),
    "reduce_scatter_single": _out_of_place("reduce_scatter", reduces=True),
    "_reduce_scatter_base": _out_of_place("reduce_scatter", reduces=True),
    "reduce_scatter_single_coalesced": _out_of_place("reduce_scatter", reduces=True),
    "reduce_scatter_tensor_coalesced": _out_of_place("reduce_scatter", reduces=True),
    "all_to_all_single": _all_to_all,
    "alltoall_base": _all_to_all,
    "alltoall": _all_to_all_of_lists,
    "send": _send,
    "recv": _receive,
    "recv_anysource": _receive_from_any,
    "barrier": _barrier("barrier"),
    "monitored_barrier": _barrier("monitored_barrier"),
}


def bytes_sent(call: Call) -> int:
    """Return the bytes that this rank sends in a call, as an algorithm that sends nothing twice would: a ring.

    all_reduce 2 (n-1)/n x    reduce_scatter (n-1)/n x    all_gather (n-1) part    all_to_all, send: what leaves
    """
    n, rank = call.group.size(), call.group.rank()
    held = sum(tensor.nbytes for tensor in call.inputs)
    if call.op == "all_reduce":
        return 2 * (n - 1) * held // n
    if call.op == "reduce_scatter":
        return (n - 1) * held // n
    if call.op == "all_gather":
        return (n - 1) * held
    if call.op == "all_to_all":
        assert call.rows is not None
        sent, stays = sum(call.rows[0]), call.rows[0][rank]
        return held * (sent - stays) // sent if sent else 0
    if call.op == "broadcast":
        return held if call.root == rank else 0
    return held if call.op in ("send", "gather", "reduce", "scatter") else 0
