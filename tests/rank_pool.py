"""A pool of forked CPU ranks on gloo that lives for the whole pytest run and is handed cases.

    run_ranks(2, case, *args)        every rank calls case(*args) -> the list of what they returned
    run_mesh(Sizes(dp_shard=2, ep=2), case, *args)      case(mesh, *args), the mesh built once for its sizes

Ranks are forked, so a case may be any picklable function of a test module. They meet in a temporary file: no
port can be taken. A gloo error is fatal to its ranks, so after any failure the pool is made anew.

Every case begins with PyTorch's own kernels, under NCCL's rules (tests/strict_group.py): each rank holds its own
calls to them, and the ranks' calls are compared here, after the case and while it hangs.
"""

import atexit
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic
from typing import Any
from unittest.mock import patch

import jaxtyping
import strict_group
import torch
import torch.distributed as dist
from strict_order import disagreements, read_lines

from meshwright.kernels.choose import Choices, use
from meshwright.parallel.mesh import Axis, Mesh, Sizes, build_mesh

TIMEOUT = timedelta(seconds=60)
# Ranks that wait for one that failed are given so long to say more; their collectives cannot end.
GRACE = timedelta(seconds=10)
# One folder for this process and the ranks forked from it, whichever test came first.
SHARED = tempfile.TemporaryDirectory(prefix="tests-")
_POOLS: dict[int, "_Pool"] = {}
_MESHES: dict[Sizes, Mesh] = {}
_GROUPS: dict[tuple[int, ...], Any] = {}
_new_group = dist.new_group


class RankFailed(AssertionError):
    """A rank raised; the message holds every rank's traceback."""


def run_ranks(size: int, case: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `case(axis, *args)` on `size` ranks, with an Axis over all of them; the parameter's name is the axis's."""
    return _pool(size).run(partial(_with_axis, case), args)


def run_mesh(sizes: Sizes, case: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `case(mesh, *args)` on the ranks of a mesh of these sizes."""
    return _pool(sizes.world).run(partial(_with_mesh, case, sizes), args)


def _with_axis(case: Callable[..., Any], *args: Any) -> Any:
    missing = case.__code__.co_argcount - len(args)
    name = case.__code__.co_varnames[0]
    world = tuple(range(dist.get_world_size()))
    axis = Axis(name, len(world), dist.get_rank(), dist.group.WORLD if len(world) > 1 else None, world)
    return case(*([axis] * missing), *args)


def _with_mesh(case: Callable[..., Any], sizes: Sizes, *args: Any) -> Any:
    if sizes not in _MESHES:
        with patch.object(dist, "new_group", _group_made_once):
            _MESHES[sizes] = build_mesh(sizes, TIMEOUT)
    strict_group.name_axes(_MESHES[sizes].axes)
    return case(_MESHES[sizes], *args)


def _group_made_once(ranks: list[int], timeout: timedelta) -> Any:
    """Make a group, or return that of the same ranks: each has a thread that wakes up a hundred times a second."""
    key = tuple(ranks)
    if key not in _GROUPS:
        _GROUPS[key] = _new_group(ranks, timeout=timeout)
    return _GROUPS[key]


def _pool(size: int) -> "_Pool":
    if size not in _POOLS:
        _POOLS[size] = _Pool(size)
    return _POOLS[size]


class _Pool:
    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("fork")
        self.size = size
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self.pipes: list[Connection] = []
        self.ranks = []
        self.logs = [Path(self.folder.name, f"calls.{rank}") for rank in range(size)]
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, self.logs[rank], theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.ranks.append(process)

    def run(self, case: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        """Hand the case to every rank and wait; on a failure end all ranks and raise with their tracebacks."""
        for log in self.logs:  # the ranks are idle, and append
            log.write_bytes(b"")
        for pipe in self.pipes:
            pipe.send((case, args))
        answers: dict[int, tuple[bool, Any]] = {}
        until = monotonic() + 2 * TIMEOUT.total_seconds()
        while len(answers) < self.size and monotonic() < until:
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in answers]
            ready = wait(waiting, timeout=0.5)
            if not ready and self._differences(ended=set(answers)):
                break  # they would wait for each other until their time is up
            for pipe in ready:
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    answers[rank] = self.pipes[rank].recv()
                except EOFError:
                    answers[rank] = (False, f"the process died with exit code {self.ranks[rank].exitcode}")
                if not answers[rank][0]:
                    until = min(until, monotonic() + GRACE.total_seconds())
        differences = self._differences(ended=set(range(self.size)))
        texts = {rank: text for rank, (ok, text) in answers.items() if not ok}
        texts |= {rank: "did not answer" for rank in range(self.size) if rank not in answers}
        if texts or differences:
            self.close()
            said = [f"--- rank {rank} of {self.size}\n{text}" for rank, text in sorted(texts.items())]
            raise RankFailed("\n".join([*said, *(f"--- the ranks' calls: {text}" for text in differences)]))
        return [answers[rank][1] for rank in range(self.size)]

    def _differences(self, ended: set[int]) -> list[str]:
        return disagreements([read_lines(log) for log in self.logs], ended)

    def close(self) -> None:
        """End the ranks; the next case gets a new pool."""
        _POOLS.pop(self.size, None)
        for process in self.ranks:
            process.kill()
            process.join()
        self.folder.cleanup()


def _serve(rank: int, size: int, log: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    _MESHES.clear()
    _GROUPS.clear()
    store = dist.FileStore(str(log.parent / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    strict_group.install(log)
    number = 0
    while True:
        try:
            case, args = pipe.recv()
        except EOFError:
            os._exit(0)
        # Types and shapes are checked on one rank, another one from case to case: checks take a quarter of the time.
        jaxtyping.config.update("jaxtyping_disable", rank != number % size)
        number += 1
        try:
            strict_group.begin_case()
            use(Choices())
            result: tuple[bool, Any] = (True, case(*args))
            strict_group.end_case()
        except BaseException:  # CheckpointException and KeyboardInterrupt are no Exceptions
            result = (False, traceback.format_exc())
        pipe.send(result)


@atexit.register
def _close_all() -> None:
    for pool in list(_POOLS.values()):
        pool.close()
    SHARED.cleanup()
