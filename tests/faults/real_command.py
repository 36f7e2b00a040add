"""The real command line in processes of their own, quickly, and with faults put into them.

    run("train", run_file)                 `meshwright train ...`: exit status, stdout, stderr
    run("train", run_file, ranks=2)        two of them, with the variables that torchrun would leave
    run(..., fault="...")                  Python that runs in each process first; it knows its `rank`
    start(...).wait()                      the same in two pieces, to send signals in between
    launch("train", run_file, "--ranks", "2", fault="...")     a new interpreter, whose parent starts the ranks

`run` and `start` fork a process that has loaded what a command loads, and nothing else: half a second instead of
five. Its children run `main()` as the console script does, without the test run's type checks and warnings filters.
"""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

SECONDS = 120
# Serves requests on stdin: {"start": {...}} is answered with a process id, {"wait": pid} with its exit status.
SERVER = """
import ctypes, json, os, signal, sys
import matplotlib.backends.backend_agg, matplotlib.figure, rich.console, rich.table, torch, torch._dynamo
import meshwright.launcher.commands.generate, meshwright.launcher.commands.train, meshwright.launcher.generation
import meshwright.launcher.training.start, meshwright.launcher.__main__, meshwright.data.prepare

def child(request):
    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # a test that fails leaves nothing behind
    for stream, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[name], os.O_RDWR | os.O_CREAT), stream)
    sys.stdin = open(0, closefd=False)
    sys.stdout, sys.stderr = open(1, "w", 1, closefd=False), open(2, "w", 1, closefd=False)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = ["meshwright", *request["args"]]
    status = 1
    try:
        exec(request["fault"], {"rank": int(os.environ.get("RANK", "0")), "__name__": "fault"})
        meshwright.launcher.__main__.main()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)

for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        pid, status = os.waitpid(request["wait"], 0 if request["block"] else os.WNOHANG)
        answer = os.waitstatus_to_exitcode(status) if pid else None
    else:
        answer = os.fork()
        if answer == 0:
            child(request["start"])
    print(json.dumps(answer), flush=True)
"""
SCRIPT = """
import os, sys
exec({fault!r}, {{"rank": int(os.environ.get("RANK", "-1")), "__name__": "fault"}})
from meshwright.launcher.__main__ import main
main()
"""


@dataclass(frozen=True)
class Done:
    """How a command ended; `status` is the first one that is not 0, `seconds` from the start to the last one's end."""

    status: int
    out: str
    err: str
    seconds: float

    def told(self, status: int, *texts: str) -> None:
        """Assert that the command ended with this status and a message that holds these texts, without a traceback."""
        assert self.status == status, f"exit status {self.status}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err, self.err
        for text in texts:
            assert text in self.err, f"{text!r} is not in:\n{self.err}"


def run(*args: Any, **settings: Any) -> Done:
    """Run a command to its end; see `start`."""
    return start(*args, **settings).wait()


def start(
    *args: Any,
    ranks: int = 1,
    fault: str = "",
    stdin: str = "",
    folder: Path | None = None,
    environment: dict[str, str] | None = None,
) -> "Started":
    """Start a command as one process, or as several ranks."""
    scratch = Path(tempfile.mkdtemp(prefix="command-", dir=_scratch()))
    (scratch / "stdin").write_text(stdin)
    variables = own_environment() | (environment or {})
    if ranks > 1:
        variables |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        variables |= {"MASTER_PORT": str(free_port())} | (environment or {})
    request = {"args": [str(arg) for arg in args], "fault": fault, "folder": str(folder or scratch)}
    request["stdin"] = str(scratch / "stdin")
    pids = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        streams = {name: str(scratch / f"{name}.{rank}") for name in ("stdout", "stderr")}
        pids.append(_Server.get().ask({"start": request | streams | {"environment": variables | own}}))
    return Started(scratch, pids)


class Started:
    """The processes of a command that runs."""

    def __init__(self, scratch: Path, pids: list[int]) -> None:
        self.scratch, self.pids, self.began = scratch, pids, time.monotonic()

    def wait_for(self, text: str, rank: int = 0) -> None:
        """Wait until a process has said something on stderr."""
        path = self.scratch / f"stderr.{rank}"
        wait_until(lambda: path.exists() and text in path.read_text(), text)

    def send(self, number: int, rank: int = 0) -> None:
        """Send a signal to one process."""
        os.kill(self.pids[rank], number)

    def wait(self) -> Done:
        """Wait for every process; what takes too long is killed, and the test fails."""
        left, statuses = dict(enumerate(self.pids)), {}
        while left:
            for rank, pid in list(left.items()):
                status = _Server.get().ask({"wait": pid, "block": False})
                if status is not None:
                    statuses[rank] = status
                    del left[rank]
            if time.monotonic() > self.began + SECONDS:
                for pid in left.values():
                    os.kill(pid, signal.SIGKILL)
                    _Server.get().ask({"wait": pid, "block": True})
                raise AssertionError(f"ranks {sorted(left)} did not end:\n{self.said('stderr')}")
            time.sleep(0.02)
        first = next((statuses[rank] for rank in sorted(statuses) if statuses[rank] != 0), 0)
        return Done(first, self.said("stdout"), self.said("stderr"), time.monotonic() - self.began)

    def said(self, stream: str) -> str:
        """Return what all processes wrote to a stream, rank by rank."""
        return "".join(path.read_text() for path in sorted(self.scratch.glob(f"{stream}.*")))


class Launched:
    """`meshwright` as a new interpreter, in a process group of its own."""

    def __init__(self, args: tuple[Any, ...], fault: str, environment: dict[str, str]) -> None:
        self.scratch = Path(tempfile.mkdtemp(prefix="command-", dir=_scratch()))
        script = self.scratch / "meshwright"  # the name by which a command knows that it may start itself again
        script.write_text(SCRIPT.format(fault=fault))
        self.began = time.monotonic()
        with (self.scratch / "stdout").open("w") as out, (self.scratch / "stderr").open("w") as err:
            command = [sys.executable, str(script), *[str(arg) for arg in args]]
            env = own_environment() | environment
            self.process = subprocess.Popen(command, stdout=out, stderr=err, env=env, process_group=0)
        atexit.register(self.process.terminate)  # a test that fails leaves nothing behind

    @property
    def err(self) -> str:
        """Return what was said on stderr so far."""
        return (self.scratch / "stderr").read_text()

    def wait_for(self, text: str) -> None:
        """Wait until something is said on stderr."""
        wait_until(lambda: text in self.err, text)

    def send(self, number: int) -> None:
        """Send a signal to the parent of the ranks."""
        self.process.send_signal(number)

    def wait(self) -> Done:
        """Wait for the parent's end; ranks that outlive it fail the test."""
        try:
            status = self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(f"it did not end:\n{self.err}") from None
        return Done(status, (self.scratch / "stdout").read_text(), self.err, time.monotonic() - self.began)


def launch(*args: Any, fault: str = "", environment: dict[str, str] | None = None) -> Launched:
    """Start the command as a user does: a new interpreter, which starts the ranks itself."""
    return Launched(args, fault, environment or {})


def wait_until(claim: Any, what: str) -> None:
    """Wait until a claim holds.

    Raises:
        AssertionError: if it does not within two minutes.
    """
    until = time.monotonic() + SECONDS
    while not claim():
        assert time.monotonic() < until, f"waited in vain for: {what}"
        time.sleep(0.01)


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@cache
def _scratch() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="commands-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def own_environment() -> dict[str, str]:
    """Return the environment of a user who has no launcher around, one thread, and a cache of the tests' own."""
    foreign = ("SLURM_", "OMPI_", "PMI_", "TORCHELASTIC_", "MASTER_", "MESHWRIGHT_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        kept.pop(name, None)
    return kept | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(_scratch()), "COLUMNS": "200"}


class _Server:
    """The process that has everything loaded and forks at request."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=own_environment(),
        )
        atexit.register(self.process.kill)

    def ask(self, request: dict[str, Any]) -> Any:
        """Send a request and return the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    @classmethod
    @cache
    def get(cls) -> "_Server":
        """Return the one server of this test run."""
        return cls()
