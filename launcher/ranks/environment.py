"""Who am I among the ranks? Read from what the program that started this process left in its environment.

    started by          is known by                    rank, of, number and count on this node
    torchrun, --ranks   RANK                           RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE
    mpirun (Open MPI)   OMPI_COMM_WORLD_RANK           OMPI_COMM_WORLD_ RANK, SIZE, LOCAL_RANK, LOCAL_SIZE
    mpirun (MPICH)      PMI_RANK                       PMI_RANK, PMI_SIZE, MPI_LOCALRANKID, MPI_LOCALNRANKS
    srun (Slurm)        SLURM_STEP_ID                  SLURM_ PROCID, STEP_NUM_TASKS, LOCALID, STEP_TASKS_PER_NODE
    nobody              none of these                  0, 1, 0, 1

The first row that fits wins: torchrun and mpirun are often themselves started by srun, whose variables then describe
them and not their ranks. The shell of a Slurm job also has SLURM_PROCID = 0 and SLURM_NTASKS, but no SLURM_STEP_ID: a
command typed there is one process of its own. `rendezvous.py` lets the ranks meet. No torch is loaded here.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

How = Literal["plain", "started here", "torchrun", "slurm", "mpirun"]
Environment = Mapping[str, str]

# Holds the descriptor of the listening socket that rank 0 inherits from launcher/ranks/local_ranks.py.
LISTENING = "MESHWRIGHT_LISTENING_FD"

# Is set where launcher/ranks/local_ranks.py started the ranks; its other variables are those of torchrun.
STARTED_HERE = "MESHWRIGHT_STARTED_HERE"

# OpenMP ends the process without a word where a thread more cannot be had.
MAX_THREADS = 1024


@dataclass(frozen=True)
class RankInfo:
    """This process's place among the ranks."""

    rank: int
    world_size: int
    local_rank: int
    """Number among the ranks of this node."""
    local_world_size: int
    """Ranks of this node."""
    node: int
    """Number of this node among the nodes of the run."""
    how: How

    @property
    def is_alone(self) -> bool:
        """Say whether there is no other rank, and so nothing to meet."""
        return self.world_size == 1


def who_am_i(environment: Environment | None = None) -> RankInfo:
    """Return this process's place among the ranks, from `environment` (default: this process's).

    Raises:
        ValueError: if a variable is missing, no whole number, or contradicts another.
    """
    env = os.environ if environment is None else environment
    if "RANK" in env:
        return _checked(_of_torchrun(env), "RANK", "WORLD_SIZE")
    if "OMPI_COMM_WORLD_RANK" in env:
        return _checked(_of_open_mpi(env), "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
    if "PMI_RANK" in env:
        return _checked(_of_mpich(env), "PMI_RANK", "PMI_SIZE")
    if "SLURM_STEP_ID" in env:
        return _checked(_of_slurm(env), "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    if "WORLD_SIZE" in env and _number(env, "WORLD_SIZE") > 1:
        raise ValueError(
            f"WORLD_SIZE = {env['WORLD_SIZE']} is set but RANK is not: unset WORLD_SIZE, or start the ranks with "
            "--ranks, torchrun, srun or mpirun"
        )
    return RankInfo(0, 1, 0, 1, 0, "plain")


def check_ranks_option(ranks: int, info: RankInfo) -> None:
    """Refuse a `--ranks` that is not what the ranks found already are; 0 means that it was not given.

    Raises:
        ValueError: if it contradicts the world that this process was started in.
    """
    if ranks and not info.is_alone and ranks != info.world_size:
        raise ValueError(
            f"--ranks {ranks} contradicts the {info.world_size} ranks that {info.how} started; leave --ranks out, or "
            f"start {ranks} of them"
        )


def threads_of(info: RankInfo, threads: int, environment: Environment | None = None) -> int:
    """Return how many CPU threads this rank may use: what the run file says (0: nothing), or its part of the cores.

    Without a number in the run file OMP_NUM_THREADS counts, but not under torchrun, which sets it to 1 when nobody
    asked. A Slurm task that is bound to cores of its own sees only these, and they are not divided again.

    Raises:
        ValueError: if OMP_NUM_THREADS counts and is no number of threads.
    """
    env = os.environ if environment is None else environment
    if threads:
        return threads
    # OpenMP's list, such as 4,2, is of nested levels, of which PyTorch has one.
    asked = env.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if asked and "TORCHELASTIC_RUN_ID" not in env:
        if not (asked.isdecimal() and 1 <= int(asked) <= MAX_THREADS):
            raise ValueError(
                f"OMP_NUM_THREADS = {env['OMP_NUM_THREADS']}: must be from 1 to {MAX_THREADS}; unset it, or give "
                "train.threads"
            )
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if info.how == "slurm":
        own = env.get("SLURM_CPUS_PER_TASK", "")
        if own.isdecimal():
            return max(1, min(int(own), cores))
        if cores < _number(env, "SLURM_CPUS_ON_NODE", default=cores):
            return cores
    return max(1, cores // info.local_world_size)


def _of_torchrun(env: Environment) -> RankInfo:
    rank, world_size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    # A launcher of two variables (RANK, WORLD_SIZE) is taken as one node, which is what a hand-written one means.
    local_world_size = _number(env, "LOCAL_WORLD_SIZE", default=world_size)
    local_rank = _number(env, "LOCAL_RANK", default=rank % local_world_size if local_world_size else rank)
    node = _number(env, "GROUP_RANK", default=rank // local_world_size if local_world_size else 0)
    return RankInfo(
        rank, world_size, local_rank, local_world_size, node, "started here" if STARTED_HERE in env else "torchrun"
    )


def _of_open_mpi(env: Environment) -> RankInfo:
    rank, world_size = _number(env, "OMPI_COMM_WORLD_RANK"), _number(env, "OMPI_COMM_WORLD_SIZE")
    local_world_size = _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE")
    # mpirun does not number the nodes; with ranks placed node by node, its default, this is the number.
    node = rank // local_world_size if local_world_size else 0
    return RankInfo(rank, world_size, _number(env, "OMPI_COMM_WORLD_LOCAL_RANK"), local_world_size, node, "mpirun")


def _of_mpich(env: Environment) -> RankInfo:
    rank, world_size = _number(env, "PMI_RANK"), _number(env, "PMI_SIZE")
    if "MPI_LOCALRANKID" not in env and env.get("SLURM_PROCID") == env["PMI_RANK"]:
        return _of_slurm(env)  # srun --mpi=pmi2 sets both
    local_world_size = _number(env, "MPI_LOCALNRANKS")
    node = rank // local_world_size if local_world_size else 0
    return RankInfo(rank, world_size, _number(env, "MPI_LOCALRANKID"), local_world_size, node, "mpirun")


def _of_slurm(env: Environment) -> RankInfo:
    node = _number(env, "SLURM_NODEID")
    per_node = tasks_per_node(_text(env, "SLURM_STEP_TASKS_PER_NODE"))
    if node >= len(per_node):
        raise ValueError(
            f"SLURM_NODEID = {node} contradicts SLURM_STEP_TASKS_PER_NODE = {env['SLURM_STEP_TASKS_PER_NODE']!r}, "
            f"which names {len(per_node)} nodes"
        )
    rank, world_size = _number(env, "SLURM_PROCID"), _number(env, "SLURM_STEP_NUM_TASKS")
    return RankInfo(rank, world_size, _number(env, "SLURM_LOCALID"), per_node[node], node, "slurm")


def tasks_per_node(text: str) -> list[int]:
    """Return the tasks of each node from Slurm's short form: "2(x3),1" is 2, 2, 2, 1.

    Raises:
        ValueError: if it is not of that form.
    """
    counts: list[int] = []
    for item in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if found is None:
            raise ValueError(f'SLURM_STEP_TASKS_PER_NODE = {text!r}: expected counts such as "2(x3),1"')
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def _checked(info: RankInfo, rank_name: str, size_name: str) -> RankInfo:
    wrong = []
    if not info.rank < info.world_size:
        wrong.append(f"{rank_name} = {info.rank} must be below {size_name} = {info.world_size}")
    if not info.local_rank < info.local_world_size:
        wrong.append(f"local rank {info.local_rank} must be below the node's number of ranks {info.local_world_size}")
    if info.local_world_size > info.world_size:
        wrong.append(f"{info.local_world_size} ranks on this node are more than {size_name} = {info.world_size}")
    if wrong:
        raise ValueError(
            f"the variables that {info.how} left contradict each other: {'; '.join(wrong)}. Variables of an outer "
            "program may have been inherited: unset them, or start the ranks with one launcher"
        )
    return info


def _text(env: Environment, name: str) -> str:
    if name not in env:
        raise ValueError(f"{name} is not set although other variables of the same launcher are; start all ranks by it")
    return env[name]


def _number(env: Environment, name: str, default: int | None = None) -> int:
    if default is not None and name not in env:
        return default
    text = _text(env, name)
    if not text.isdecimal():
        raise ValueError(f"{name} = {text!r}: must be a whole number of at least 0")
    return int(text)
