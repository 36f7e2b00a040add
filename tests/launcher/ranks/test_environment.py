"""A process finds its place among the ranks, whoever started it; what cannot be true is refused."""

import os
import subprocess
import sys

import pytest

from meshwright.launcher.ranks.environment import (
    STARTED_HERE,
    RankInfo,
    check_ranks_option,
    tasks_per_node,
    threads_of,
    who_am_i,
)

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"}
# What a task of `srun` on the second of two nodes sees, from a real Slurm 22.05.
SRUN = {
    "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NTASKS": "4",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}


def test_each_launcher_is_understood() -> None:
    assert who_am_i({}) == RankInfo(0, 1, 0, 1, 0, "plain")
    assert who_am_i(TORCHRUN) == RankInfo(5, 8, 1, 4, 1, "torchrun")
    assert who_am_i(TORCHRUN | {STARTED_HERE: "1"}).how == "started here"
    assert who_am_i(SRUN) == RankInfo(3, 4, 1, 2, 1, "slurm")
    assert who_am_i(OPEN_MPI) == RankInfo(1, 4, 1, 2, 0, "mpirun")
    assert who_am_i(MPICH) == RankInfo(2, 4, 0, 2, 1, "mpirun")


def test_the_inner_launcher_wins_where_srun_started_it() -> None:
    for inner in (TORCHRUN, OPEN_MPI, MPICH):
        assert who_am_i(SRUN | inner) == who_am_i(inner)


def test_srun_with_pmi2_is_slurm() -> None:
    assert who_am_i(SRUN | {"PMI_RANK": "3", "PMI_SIZE": "4"}) == who_am_i(SRUN)


def test_the_shell_of_a_slurm_job_is_one_process() -> None:
    shell = {name: value for name, value in SRUN.items() if "STEP" not in name} | {"SLURM_PROCID": "0"}
    assert who_am_i(shell).how == "plain"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (TORCHRUN | {"RANK": "8"}, "RANK = 8 must be below WORLD_SIZE = 8"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "local rank 4 must be below the node's number of ranks 4"),
        (TORCHRUN | {"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "7"}, "7 ranks on this node are more than WORLD_SIZE = 6"),
        (TORCHRUN | {"RANK": "first"}, "RANK = 'first': must be a whole number"),
        ({"RANK": "0"}, "WORLD_SIZE is not set although"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE = 4 is set but RANK is not"),
        (SRUN | {"SLURM_PROCID": "4"}, "SLURM_PROCID = 4 must be below SLURM_STEP_NUM_TASKS = 4"),
        (SRUN | {"SLURM_NODEID": "2"}, "SLURM_NODEID = 2 contradicts SLURM_STEP_TASKS_PER_NODE"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "two"}, "expected counts such as"),
    ],
)
def test_variables_that_cannot_be_true_are_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        who_am_i(environment)


def test_slurms_short_form_is_unfolded() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("8") == [8]


def test_ranks_option_must_agree_with_the_ranks_found() -> None:
    check_ranks_option(8, who_am_i(TORCHRUN))
    check_ranks_option(0, who_am_i(TORCHRUN))
    check_ranks_option(2, who_am_i({}))
    with pytest.raises(ValueError, match="--ranks 2 contradicts the 8 ranks that torchrun started"):
        check_ranks_option(2, who_am_i(TORCHRUN))


def test_threads_come_from_run_file_then_variable_then_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert threads_of(who_am_i(TORCHRUN), 3, {"OMP_NUM_THREADS": "7"}) == 3
    assert threads_of(who_am_i(TORCHRUN), 0, {"OMP_NUM_THREADS": "7"}) == 7
    assert threads_of(who_am_i({}), 0, {"OMP_NUM_THREADS": "4,2"}) == 4  # nested levels, of which there is one
    for wrong in ("99999999", "0", "abc", "-1"):
        assert threads_of(who_am_i({}), 3, {"OMP_NUM_THREADS": wrong}) == 3
        with pytest.raises(ValueError, match=f"OMP_NUM_THREADS = {wrong}: must be from 1 to 1024; unset it"):
            threads_of(who_am_i({}), 0, {"OMP_NUM_THREADS": wrong})
    assert threads_of(who_am_i({}), 0, {}) == cores
    assert threads_of(who_am_i(TORCHRUN), 0, {}) == max(1, cores // 4)


def test_torchruns_own_single_thread_is_not_taken_for_a_wish() -> None:
    cores = len(os.sched_getaffinity(0))
    alone = who_am_i(TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"})
    assert threads_of(alone, 0, {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}) == cores


def test_a_task_bound_to_its_own_cores_does_not_divide_them_again() -> None:
    cores = len(os.sched_getaffinity(0))
    info = who_am_i(SRUN)
    assert threads_of(info, 0, SRUN | {"SLURM_CPUS_ON_NODE": str(2 * cores)}) == cores
    assert threads_of(info, 0, SRUN | {"SLURM_CPUS_ON_NODE": str(cores)}) == max(1, cores // 2)
    assert threads_of(info, 0, SRUN | {"SLURM_CPUS_PER_TASK": "1"}) == 1


def test_asking_who_am_i_loads_no_torch() -> None:
    code = "import sys, meshwright.launcher.ranks.local_ranks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
