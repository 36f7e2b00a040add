"""Where the ranks meet: the address and port of rank 0's store, the process group, and how they part.

    started by   address of rank 0                            port
    (any)        MASTER_ADDR, where it is set                 MASTER_PORT, where it is set
    --ranks      this machine                                 a socket that the parent listens on and rank 0 inherits
    torchrun     set by it                                    set by it
    srun         the step's first node, by name, or else      from job id, step id and restart count, below the
                 by the NodeAddr that Slurm holds for it      ports that systems give to clients
    mpirun       this machine when all ranks are on it, or    from the number of the process that started them, or
                 rank 0's, told by mpi4py                     free on rank 0's node, told by mpi4py

The ranks first sign in at the store, so that a rank that is missing, doubled, or of another world is told by name
before a collective hangs on it.
"""

import os
import queue
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from meshwright.launcher.ranks.environment import LISTENING, RankInfo

# A node that is up joins within this time; only a run that may not wait so long (timeout_seconds) gives up sooner.
JOIN_SECONDS = 300
# Below 32768, where Linux begins to hand out ports to clients.
_FIRST_PORT, _NUM_PORTS = 20000, 12000
_SHOWN = 8
_LINGER_SECONDS = 2
_LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "connection refused",
    "remote process exited",
    "application timeout caused pair closure",
)
_WAITED = ("timed out waiting", "wait timeout", "operation timed out", "watchdog caught collective operation timeout")


class RendezvousError(ConnectionError):
    """The ranks could not meet or lost each other; the message says who is missing or what stood in the way."""


class LostRankError(RendezvousError):
    """Another rank ended, or does not answer."""

    is_consequence = True


@contextmanager
def process_group(info: RankInfo, device: torch.device, timeout_seconds: int) -> Iterator[None]:
    """Meet the other ranks, hold the default process group, and part from them; a rank that is alone needs none.

    A collective that waits longer than `timeout_seconds` for the others ends with an error. At the end the ranks wait
    for each other, so that rank 0 does not take its store away while another still needs it. After an error they do
    not: the others may never come, and the end of the process frees everything.

    Raises:
        RendezvousError: if the port is taken, not all ranks come, or one of them is gone or stuck later on.
    """
    if not info.is_alone:
        _meet(info, device, timeout_seconds)
    try:
        yield
    except RuntimeError as error:
        if lost := explain(error, info):
            raise LostRankError(lost) from error
        raise
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _meet(info: RankInfo, device: torch.device, timeout_seconds: int) -> None:
    address, port = meeting_point(info)
    join_seconds = min(timeout_seconds, JOIN_SECONDS)
    if "GLOO_SOCKET_IFNAME" not in os.environ and (name := interface_towards(address)):
        # Gloo's own choice is the address of the host's name, on Debian often 127.0.1.1, where no other node gets.
        os.environ["GLOO_SOCKET_IFNAME"] = name
    store = _open_store(info, address, port, join_seconds)
    _sign_in(store, info, f"{address}:{port}", join_seconds)
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=PrefixStore("group", store),
        rank=info.rank,
        world_size=info.world_size,
        timeout=timedelta(seconds=timeout_seconds),
        device_id=device if on_gpu else None,
    )


def explain(error: BaseException, info: RankInfo) -> str | None:
    """Return one line for an error that only says that other ranks are gone or late; None for any other error."""
    text = str(error).lower()
    if info.is_alone or not isinstance(error, RuntimeError):
        return None
    if any(sign in text for sign in _LOST):
        return f"rank {info.rank}: another rank ended or was cut off; what that rank says first is the cause"
    if any(sign in text for sign in _WAITED):
        return (
            f"rank {info.rank}: waited longer than run.timeout_seconds for another rank, which is stuck, stopped or "
            "cut off; a rank that did not print this line is the one to look at"
        )
    return None


def meeting_point(info: RankInfo, environment: Mapping[str, str] | None = None) -> tuple[str, int]:
    """Return address and port of rank 0's store, the same on every rank.

    Raises:
        ValueError: if they cannot be known; the message says what to set.
    """
    env = os.environ if environment is None else environment
    address, port = env.get("MASTER_ADDR", ""), env.get("MASTER_PORT", "")
    if port and not (port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(f"MASTER_PORT = {port!r}: must be a port, 1 to 65535")
    if address and port:
        return address, int(port)
    if info.how == "slurm":
        return address or _slurm_address(info, env), int(port or slurm_port(env))
    if info.how == "mpirun":
        if info.local_world_size == info.world_size:
            # Ranks that one mpirun started on one machine have the same parent.
            return address or "127.0.0.1", int(port or _FIRST_PORT + os.getppid() % _NUM_PORTS)
        return _told_by_mpi(info)
    missing = " and ".join(name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name))
    raise ValueError(
        f"RANK and WORLD_SIZE are set but {missing} is not: start the ranks with --ranks, torchrun or srun"
    )


def slurm_port(env: Mapping[str, str]) -> int:
    """Return a port that differs between jobs, the steps of a job and its restarts.

    Raises:
        ValueError: if one of Slurm's numbers is none.
    """
    numbers = []
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"):
        text = env.get(name) or "0"
        if not text.isdecimal():
            raise ValueError(f"{name} = {text!r}: must be a whole number, as Slurm sets it")
        numbers.append(int(text))
    job, step, restart = numbers
    return _FIRST_PORT + (job + 101 * step + 997 * restart) % _NUM_PORTS


def first_host(nodelist: str) -> str:
    """Return the first host of Slurm's short form: "rack2-node[07-09,12],login1" gives "rack2-node07"."""
    outside = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", outside[0]) if outside else ""


def interface_towards(address: str) -> str | None:
    """Return the name of the network interface through which `address` is reached; None if it cannot be told."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # a datagram socket: nothing is sent
            own: str = probe.getsockname()[0]
    except OSError:
        return None
    interfaces: dict[str, list[str]] = {name: [it.address for it in of] for name, of in psutil.net_if_addrs().items()}
    return next((name for name, addresses in interfaces.items() if own in addresses), None)


def _slurm_address(info: RankInfo, env: Mapping[str, str]) -> str:
    if info.local_world_size == info.world_size:
        return "127.0.0.1"
    host = first_host(env.get("SLURM_STEP_NODELIST", ""))
    try:
        socket.getaddrinfo(host or "-", None)
        return host
    except OSError:
        pass
    try:
        shown = subprocess.run(["scontrol", "show", "node", host], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        shown = ""
    found = re.search(r"NodeAddr=(\S+)", shown)
    if found is None:
        raise ValueError(
            f"SLURM_STEP_NODELIST = {env.get('SLURM_STEP_NODELIST')!r}: its first node {host!r} has no address that "
            "this node can find, neither by name nor by scontrol; set MASTER_ADDR to the address of rank 0's node"
        )
    return found[1]


def _told_by_mpi(info: RankInfo) -> tuple[str, int]:
    try:
        from mpi4py import MPI  # type: ignore[import-not-found,unused-ignore]
    except Exception as error:  # a half-installed MPI raises RuntimeError, or anything
        raise ValueError(
            f"mpirun started {info.world_size} ranks on more than one node, and mpi4py cannot tell where rank 0 is "
            f"({type(error).__name__}: {error}); install mpi4py, or give MASTER_ADDR and MASTER_PORT to all ranks"
        ) from None
    mine = None
    if info.rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            mine = (socket.gethostname(), probe.getsockname()[1])
    told: tuple[str, int] = MPI.COMM_WORLD.bcast(mine, root=0)
    return told


def _open_store(info: RankInfo, address: str, port: int, join_seconds: int) -> Store:
    held_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if held_by_torchrun and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise ValueError(
            "torchrun with --max-restarts hands its own store to the ranks, where those of a restart find the dead "
            "ones' addresses; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun"
        )
    is_master = info.rank == 0 and not held_by_torchrun
    listening = os.environ.get(LISTENING, "")
    try:
        return _within(
            join_seconds + _LINGER_SECONDS,
            lambda: TCPStore(
                address,
                port,
                is_master=is_master,
                timeout=timedelta(seconds=join_seconds),
                wait_for_workers=False,
                master_listen_fd=int(listening) if listening and is_master else None,
            ),
        )
    except (RuntimeError, ValueError) as error:  # DistNetworkError and DistStoreError are RuntimeErrors
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise RendezvousError(
                f"port {port} is in use on {socket.gethostname()}, where rank 0 would let the others meet; "
                "set MASTER_PORT to a free one on every node"
            ) from None
        raise RendezvousError(
            f"rank {info.rank} of {info.world_size} found nobody at {address}:{port}, where rank 0 should be, within "
            f"{join_seconds} s; see whether rank 0 started, and whether its node can be reached from "
            f"{socket.gethostname()} ({_first_line(error)})"
        ) from None


def _within(seconds: int, connect: Callable[[], TCPStore]) -> TCPStore:
    """Return what `connect` does; its own timeout does not hold while it waits for a stranger's first word.

    Raises:
        RuntimeError: if it takes longer, or whatever `connect` raises.
    """
    answers: queue.SimpleQueue[TCPStore | Exception] = queue.SimpleQueue()

    def attempt() -> None:
        try:
            answers.put(connect())
        except Exception as error:
            answers.put(error)

    threading.Thread(target=attempt, name="rendezvous", daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise RuntimeError("something listens there and does not answer: another program has the port") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _sign_in(store: Store, info: RankInfo, where: str, join_seconds: int) -> None:
    """Wait until every rank is here. The store's key "all" is "here", or the reason why it can never be."""
    agreed = store.compare_set("world_size", "", str(info.world_size)).decode()
    same = "start all ranks with the same command"
    if agreed != str(info.world_size):
        store.set("all", f"rank {info.rank} was started in a world of {info.world_size}, others of {agreed}; {same}")
    elif store.add(f"rank/{info.rank}", 1) > 1:
        store.set("all", f"two processes were started as rank {info.rank} of {info.world_size}; {same}")
    elif store.add("joined", 1) == info.world_size:
        store.set("all", "here")
    try:
        # Rank 0 gives up first and says who is missing, so that all ranks say the same.
        store.wait(["all"], timedelta(seconds=join_seconds if info.rank == 0 else join_seconds + _LINGER_SECONDS))
    except RuntimeError as error:
        if info.rank != 0:
            raise RendezvousError(
                f"rank 0 went away from {where} before all were there: {_first_line(error)}"
            ) from None
        store.set("all", _who_is_missing(store, info, where, join_seconds))
    answer = store.get("all").decode()
    if answer != "here":
        if info.rank == 0:
            time.sleep(_LINGER_SECONDS)  # the store ends with this process; let the others read why
        raise RendezvousError(answer)


def _who_is_missing(store: Store, info: RankInfo, where: str, seconds: int) -> str:
    missing = [str(rank) for rank in range(info.world_size) if not store.check([f"rank/{rank}"])]
    named = ", ".join(missing[:_SHOWN]) + (f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else "")
    return (
        f"rank 0 waited {seconds} s at {where} for {info.world_size} ranks; missing: {named}; "
        f"see what these printed, and whether their nodes reach {where}"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
