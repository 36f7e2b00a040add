"""Local ranks are started, told what their parent is told, and never outlive one of them by more than seconds."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from virtual_slurm import is_running

RUN = """
import sys
from meshwright.launcher.ranks.local_ranks import run_local_ranks
sys.exit(run_local_ranks(sys.argv[2:], 2))
"""
BECOME = """
import os, sys
from meshwright.launcher.ranks.local_ranks import become_a_rank
info = become_a_rank(int(sys.argv[1]))
line = f"PLACE {info.rank} {info.world_size} {info.how} {os.environ.get('MALLOC_TRIM_THRESHOLD_')}\\n"
os.write(1, line.encode())  # one call, so that the ranks' lines do not mix
"""
LOADED = "import sys; sys.modules['torch'] = sys"  # too late to start again
# A rank without torch: `body` sees its rank, the folder for its notes, and the signals that it was sent.
RANK = """
import os, signal, sys, time
rank, folder, heard = int(os.environ["RANK"]), {folder!r}, []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
    signal.signal(number, lambda number, frame: heard.append(signal.Signals(number).name))
open(f"{{folder}}/up{{rank}}", "w").write(str(os.getpid()))
def wait_for(what, seconds=30):
    until = time.monotonic() + seconds
    while not what() and time.monotonic() < until: time.sleep(0.02)
{body}
"""


def _hear_interrupts() -> None:
    """Undo what a shell does to a command in the background, whose children inherit that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Parent:
    """A process that runs `body` as two ranks."""

    def __init__(self, folder: Path, body: str, **environment: str) -> None:
        self.folder = folder
        rank = RANK.format(folder=str(folder), body=body)
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, "--", sys.executable, "-c", rank],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=_hear_interrupts,
        )

    def wait_until_up(self) -> list[int]:
        """Return the process ids of the ranks once both have set up their signals."""
        until = time.monotonic() + 30
        files = [self.folder / "up0", self.folder / "up1"]
        while not all(file.exists() and file.read_text() for file in files):
            assert time.monotonic() < until, "the ranks did not come up"
            time.sleep(0.02)
        return [int(file.read_text()) for file in files]

    def end(self, seconds: float = 30) -> tuple[int, str]:
        """Return exit status and output; fail if that takes longer than `seconds`."""
        said = self.process.communicate(timeout=seconds)[0]
        return self.process.returncode, said


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what a launcher around the tests may have set."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR", "OMP_NUM_THREADS", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)


def test_ranks_get_their_place_their_threads_and_kept_memory(tmp_path: Path) -> None:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"]
    note = f"open(f'{tmp_path}/{{rank}}', 'w').write(' '.join(os.environ[n] for n in {names}))\n"
    note += "assert os.environ['MALLOC_TRIM_THRESHOLD_'] and os.environ['MALLOC_MMAP_THRESHOLD_']\n"
    note += "assert int(os.environ['OMP_NUM_THREADS']) == max(1, len(os.sched_getaffinity(0)) // 2)\n"
    note += "assert ('MESHWRIGHT_LISTENING_FD' in os.environ) == (rank == 0)"
    status, said = Parent(tmp_path, note).end()
    assert (status, said) == (0, "")
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["0 0 2 2 127.0.0.1", "1 1 2 2 127.0.0.1"]


def test_rank_0_inherits_the_socket_that_others_reach(tmp_path: Path) -> None:
    body = """
import socket
where = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
if rank == 0: socket.socket(fileno=int(os.environ["MESHWRIGHT_LISTENING_FD"])).accept()[0].sendall(b"hello")
else: sys.exit(socket.create_connection(where).recv(5) != b"hello")
"""
    assert Parent(tmp_path, body).end() == (0, "")


def test_a_rank_that_dies_ends_even_one_that_does_not_listen(tmp_path: Path) -> None:
    body = "wait_for(lambda: os.path.exists(f'{folder}/up0'))\nif rank == 1: sys.exit(3)\nwhile True: time.sleep(0.05)"
    started = time.monotonic()
    parent = Parent(tmp_path, body)
    stuck = parent.wait_until_up()[0]
    status, said = parent.end(20)
    assert time.monotonic() - started < 15
    assert status == 1
    assert said == "meshwright: rank 1 of 2 ended with exit code 3. The others were ended.\n"
    assert not is_running(stuck)


def test_a_rank_that_is_killed_is_named(tmp_path: Path) -> None:
    parent = Parent(tmp_path, "wait_for(lambda: heard)\nsys.exit(1)")
    os.kill(parent.wait_until_up()[0], signal.SIGKILL)
    status, said = parent.end(20)
    assert status == 1
    assert "rank 0 of 2 was killed by SIGKILL" in said
    assert "rank 1" not in said


def test_of_ranks_that_fail_one_after_the_other_the_first_is_named(tmp_path: Path) -> None:
    status, said = Parent(tmp_path, "time.sleep(0.4 * (1 - rank))\nsys.exit(3 + rank)").end()
    assert (status, said) == (1, "meshwright: rank 1 of 2 ended with exit code 4.\n")


def test_status_2_of_every_rank_stays_2_and_nothing_is_added(tmp_path: Path) -> None:
    body = "if rank == 0: print('vocab_size = 7: too small', flush=True)\nsys.exit(2)"
    assert Parent(tmp_path, body).end() == (2, "vocab_size = 7: too small\n")


def test_status_2_of_one_rank_names_it(tmp_path: Path) -> None:
    status, said = Parent(tmp_path, "if rank == 1: sys.exit(2)\nwait_for(lambda: heard)").end()
    assert status == 2
    assert "rank 1 of 2 ended with exit code 2" in said


@pytest.mark.parametrize(
    ("sent", "expected"),
    [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGTERM"), ("SIGUSR1", "SIGUSR1"), ("SIGUSR2", "SIGUSR2")],
)
def test_a_signal_reaches_each_rank_once_and_their_saving_is_awaited(tmp_path: Path, sent: str, expected: str) -> None:
    body = "wait_for(lambda: heard)\ntime.sleep(0.7)\nopen(f'{folder}/saved{rank}', 'w').write(' '.join(heard))"
    parent = Parent(tmp_path, body)
    parent.wait_until_up()
    parent.process.send_signal(signal.Signals[sent])
    assert parent.end() == (0, "")
    assert [(tmp_path / f"saved{rank}").read_text() for rank in (0, 1)] == [expected, expected]


def test_a_save_that_fails_after_a_signal_fails_the_run(tmp_path: Path) -> None:
    parent = Parent(tmp_path, "wait_for(lambda: heard)\ntime.sleep(0.3 * rank)\nsys.exit(rank)")
    parent.wait_until_up()
    parent.process.send_signal(signal.SIGUSR1)
    status, said = parent.end()
    assert status == 1
    assert "rank 1 of 2 ended with exit code 1" in said


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    parent = Parent(tmp_path, "while True: time.sleep(0.05)")
    parent.wait_until_up()
    parent.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    parent.process.send_signal(signal.SIGINT)
    told = "meshwright: ended at once, at the second Ctrl-C; the checkpoints that are finished stay\n"
    assert parent.end(10) == (1, told)


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        ("SIGTERM", "told to stop (SIGTERM)"),
        pytest.param("SIGINT", "told to stop (SIGINT)", marks=pytest.mark.slow),
        pytest.param("SIGUSR1", "told to stop (SIGUSR1)", marks=pytest.mark.slow),
        ("SIGUSR2", "asked for a checkpoint (SIGUSR2)"),
    ],
)
def test_a_signal_while_ranks_start_is_told_as_what_it_is(tmp_path: Path, sent: str, told: str) -> None:
    """Rank 0 hears signals already and rank 1 does not yet, as if it were still loading torch."""
    deaf = "for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2): signal.signal(number, signal.SIG_DFL)\n"
    body = f"if rank == 1:\n    {deaf}    open(f'{{folder}}/deaf', 'w')\nwhile True: time.sleep(0.05)"
    parent = Parent(tmp_path, body.replace("{folder}", str(tmp_path)))
    parent.wait_until_up()
    until = time.monotonic() + 30
    while not (tmp_path / "deaf").exists() and time.monotonic() < until:
        time.sleep(0.02)
    parent.process.send_signal(signal.Signals[sent])
    status, said = parent.end(20)
    assert status == 1  # no checkpoint was written, and 0 says that one was
    assert said == (
        f"meshwright: the run was {told} before its first step, while its ranks were starting, and ended. Nothing was"
        " lost: the same command starts it again, from the newest checkpoint if there is one\n"
    )


def test_a_rank_that_fails_by_itself_after_a_signal_is_named(tmp_path: Path) -> None:
    parent = Parent(tmp_path, "wait_for(lambda: heard)\nos.kill(os.getpid(), signal.SIGKILL if rank else 0)")
    parent.wait_until_up()
    parent.process.send_signal(signal.SIGTERM)
    status, said = parent.end(20)
    assert status == 1
    assert "rank 1 of 2 was killed by SIGKILL (the system does this when memory runs out)" in said


def test_ranks_whose_parent_is_killed_are_told_to_save(tmp_path: Path) -> None:
    body = "wait_for(lambda: heard)\nopen(f'{folder}/saved{rank}', 'w').write(' '.join(heard))"
    parent = Parent(tmp_path, body)
    ranks = parent.wait_until_up()
    parent.process.kill()
    parent.end()
    until = time.monotonic() + 10
    while any(map(is_running, ranks)) and time.monotonic() < until:
        time.sleep(0.05)
    assert [(tmp_path / f"saved{rank}").read_text() for rank in (0, 1)] == ["SIGTERM", "SIGTERM"]


def test_a_master_port_in_use_is_refused_before_any_rank_starts(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        status, said = Parent(tmp_path, "", MASTER_PORT=port).end()
    assert status == 1  # the ValueError of a bare interpreter; the command line turns it into 2
    assert f"port {port} cannot be had" in said
    assert not (tmp_path / "up0").exists()


def test_a_command_becomes_its_own_ranks(tmp_path: Path) -> None:
    command = tmp_path / "meshwright"  # a command of this name may start itself again
    command.write_text(BECOME)
    done = subprocess.run([sys.executable, command, "2"], capture_output=True, text=True, timeout=60, check=True)
    trim = str(2**34)
    assert sorted(done.stdout.splitlines()) == [f"PLACE {rank} 2 started here {trim}" for rank in (0, 1)]


@pytest.mark.parametrize(
    ("name", "before", "kept"),
    [("meshwright", "", str(2**34)), ("my_program.py", "", "None"), ("meshwright", LOADED, "None")],
)
def test_only_our_command_starts_itself_again_to_keep_memory(tmp_path: Path, name: str, before: str, kept: str) -> None:
    command = tmp_path / name
    command.write_text(before + BECOME)
    done = subprocess.run([sys.executable, command, "0"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"PLACE 0 1 plain {kept}\n"
