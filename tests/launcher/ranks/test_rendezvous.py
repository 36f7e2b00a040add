"""Ranks agree on where to meet, and say clearly why they could not."""

import multiprocessing
import os
import socket
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from meshwright.launcher.ranks.environment import who_am_i
from meshwright.launcher.ranks.rendezvous import (
    RendezvousError,
    explain,
    first_host,
    interface_towards,
    meeting_point,
    process_group,
    slurm_port,
)

TWO = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
SLURM = {
    "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "no-such-node-[1-2]", "SLURM_JOB_ID": "70",
}  # fmt: skip
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip


def sign_in(environment: dict[str, str], seconds: int, answer: Connection) -> None:
    """Meet the others as the rank that `environment` says, and tell the sum of all ranks, or why there is none."""
    os.environ.update(TWO | environment)
    torch.set_num_threads(1)
    try:
        with process_group(who_am_i(), torch.device("cpu"), seconds):
            if environment.get("LEAVES"):
                os._exit(1)
            sum_of_ranks = torch.tensor([float(who_am_i().rank)])
            torch.distributed.all_reduce(sum_of_ranks)
        answer.send(str(sum_of_ranks.item()))
    except RendezvousError as error:
        answer.send(str(error))


def meet(worlds: list[dict[str, str]], seconds: int) -> list[str]:
    """Fork one process for each environment and return what each of them says about the meeting."""
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for world in worlds:
        ours, theirs = context.Pipe(duplex=False)
        pipes.append(ours)
        processes.append(context.Process(target=sign_in, args=(world, seconds, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
    said = []
    for pipe in pipes:
        assert pipe.poll(60), "a rank said nothing"
        try:
            said.append(pipe.recv())
        except EOFError:
            said.append("gone")
    for process in processes:
        process.join(10)
    return said


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_ranks_meet_and_sum() -> None:
    port = free_port()
    assert meet([{"RANK": "0", "MASTER_PORT": port}, {"RANK": "1", "MASTER_PORT": port}], 30) == ["1.0", "1.0"]


def test_a_rank_that_is_left_alone_says_so_in_one_line() -> None:
    port = free_port()
    said = meet([{"RANK": "0", "MASTER_PORT": port}, {"RANK": "1", "MASTER_PORT": port, "LEAVES": "1"}], 30)
    assert said == ["rank 0: another rank ended or was cut off; what that rank says first is the cause", "gone"]


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert f"port {port} is in use" in meet([{"RANK": "0", "MASTER_PORT": port}], 5)[0]


def test_a_rank_that_does_not_come_is_named() -> None:
    said = meet([{"RANK": "0", "MASTER_PORT": free_port()}], 2)[0]
    assert "rank 0 waited 2 s" in said
    assert "missing: 1;" in said


def test_worlds_of_two_sizes_are_refused_at_once() -> None:
    port = free_port()
    said = meet([{"RANK": "0", "MASTER_PORT": port}, {"RANK": "1", "MASTER_PORT": port, "WORLD_SIZE": "3"}], 30)
    assert all("others of" in line and "same command" in line for line in said)


def test_two_processes_of_one_rank_are_refused_at_once() -> None:
    port = free_port()
    three = {"MASTER_PORT": port, "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
    said = meet([three | {"RANK": "0"}, three | {"RANK": "1"}, three | {"RANK": "1"}], 30)
    assert all("two processes were started as rank 1" in line for line in said)


def test_slurm_ranks_meet_at_the_first_node_where_scontrol_says_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$3" = no-such-node-1 ] && echo "   NodeAddr=10.9.8.7 NodeHostName=x"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert meeting_point(who_am_i(SLURM), SLURM) == ("10.9.8.7", slurm_port(SLURM))
    scontrol.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(ValueError, match="set MASTER_ADDR"):
        meeting_point(who_am_i(SLURM), SLURM)


def test_what_the_user_sets_wins() -> None:
    own = {"MASTER_ADDR": "10.1.1.1", "MASTER_PORT": "1234"}
    for launcher in (SLURM, MPIRUN, TWO | {"RANK": "0"}):
        assert meeting_point(who_am_i(launcher), launcher | own) == ("10.1.1.1", 1234)
    with pytest.raises(ValueError, match="MASTER_PORT = '99999'"):
        meeting_point(who_am_i(SLURM), SLURM | {"MASTER_PORT": "99999"})
    with pytest.raises(ValueError, match="MASTER_PORT is not"):
        meeting_point(who_am_i(TWO | {"RANK": "0"}), TWO)


def test_jobs_steps_and_restarts_use_different_ports() -> None:
    variables = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    cases = [("70", "0", "0"), ("71", "0", "0"), ("70", "1", "0"), ("70", "0", "1"), ("70", "0", "2")]
    ports = {slurm_port(dict(zip(variables, case, strict=True))) for case in cases}
    assert len(ports) == len(cases)
    assert all(20000 <= port < 32000 for port in ports)


def test_ranks_of_one_mpirun_on_one_machine_agree_without_being_told() -> None:
    assert meeting_point(who_am_i(MPIRUN), MPIRUN)[0] == "127.0.0.1"


def test_the_first_host_of_a_list_is_unfolded() -> None:
    assert first_host("rack2-node[07-09,12],login1") == "rack2-node07"
    assert first_host("r[1-2]n[3,5],x") == "r1n3"
    assert first_host("gpu-a,gpu-b") == "gpu-a"


def test_the_interface_of_this_machine_is_found() -> None:
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no-such-host.invalid") is None


def test_an_error_that_only_says_that_others_are_gone_is_told_in_one_line() -> None:
    info = who_am_i({"RANK": "0"} | TWO)
    assert "another rank ended" in (
        explain(RuntimeError("x.cc:553] Connection closed by peer [::1]:50112"), info) or ""
    )
    assert "timeout_seconds" in (explain(RuntimeError("Timed out waiting 8000ms for recv operation"), info) or "")
    assert explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), info) is None
    assert explain(RuntimeError("Connection closed by peer"), who_am_i({})) is None


def test_a_job_number_that_is_none_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="SLURM_JOB_ID = 'abc': must be a whole number"):
        slurm_port(SLURM | {"SLURM_JOB_ID": "abc"})
