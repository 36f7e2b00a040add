"""A real Slurm on one machine: munged, slurmctld, and one slurmd for each virtual node, all in a folder of their own.

munged ---- slurmctld ---- slurmd node1     the same host under another node name and port;
                      `--- slurmd node2     /dev/tty0 and tty1 stand for two GPUs on each

Debian's packages: slurmctld slurmd slurm-client munge. No systemd, no database; needs root.
Two nodes are ready in about 0.3 s. Clients need nothing but SLURM_CONF.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo")

CONFIG = """\
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/munge.socket,cred_expire=6
CryptoType=crypto/munge
StateSaveLocation={folder}/control
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
# More CPUs than the machine has: a virtual node is as large as its test needs.
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
BatchStartTimeout=2
MessageTimeout=10
SlurmdTimeout=10
SlurmctldTimeout=30
GresTypes=gpu
AccountingStorageType=accounting_storage/none
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str:
    """Return why no virtual cluster can run here; empty if one can."""
    # Daemons are in sbin, which not every user's PATH has.
    missing = [name for name in PROGRAMS if _program(name) is None]
    if missing:
        return f"no {', '.join(missing)} here; on Debian: apt-get install slurmctld slurmd slurm-client munge"
    if os.geteuid() != 0:
        return "Slurm's daemons are started by root only"
    if not any(Path("/sys/fs/cgroup").iterdir()):
        return "slurmd needs a mounted /sys/fs/cgroup"
    return ""


@dataclass(frozen=True)
class Job:
    """How a job ended."""

    state: str
    exit_code: str
    """Exit status and signal of the batch script, as Slurm writes them: "2:0"."""
    output: str
    seconds: float


class VirtualSlurm:
    """A cluster of virtual nodes, from its start to `stop()`."""

    def __init__(self, folder: Path, num_nodes: int = 2) -> None:
        """Write the configuration, start the daemons and wait until every node is idle."""
        self.folder, self.num_nodes = folder, num_nodes
        for name in ("control", "log", "run", "munge", *(f"spool/node{i + 1}" for i in range(num_nodes))):
            (folder / name).mkdir(parents=True)
        folder.chmod(0o755)
        (folder / "munge").chmod(0o755)
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._write_config()
        try:
            self._start_daemons()
        except BaseException:
            self.stop()
            raise

    def submit(self, *arguments: str, cwd: Path, **environment: str) -> str:
        """Submit a job by `sbatch` and return its number; the job's output goes into the cluster's folder."""
        command = ["sbatch", "--parsable", f"--output={self.folder}/job-%j.out", *arguments]
        done = subprocess.run(
            command, cwd=cwd, env=self.environment | environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def wait(self, job: str, seconds: float = 300) -> Job:
        """Wait for a job's end. Asks `scontrol` several times a second: `sbatch --wait` asks every ten."""
        started = time.monotonic()
        output = self.folder / f"job-{job}.out"
        while True:
            shown = self._run("scontrol", "-o", "show", "job", job)
            state = re.search(r"JobState=(\S+)", shown)
            took = time.monotonic() - started
            if state and state[1] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
                code = re.search(r" ExitCode=(\S+)", shown)
                return Job(state[1], code[1] if code else "", output.read_text() if output.exists() else "", took)
            if took > seconds:
                said = output.read_text() if output.exists() else "(no output)"
                raise AssertionError(f"job {job} did not end in {seconds} s: {shown}\n{said}\n{self._logs()}")
            time.sleep(0.2)

    def stop(self) -> None:
        """End every daemon that was started, and the jobs with them."""
        with suppress(subprocess.SubprocessError, OSError):
            subprocess.run(["scancel", "--user=root"], env=self.environment, capture_output=True, timeout=20)
        pids: list[int] = []
        for file in [*sorted((self.folder / "run").glob("*.pid")), self.folder / "munge" / "munged.pid"]:
            with suppress(OSError, ValueError):
                pids.append(int(file.read_text()))
                os.kill(pids[-1], signal.SIGTERM)
        until = time.monotonic() + 10
        while any(map(is_running, pids)) and time.monotonic() < until:
            time.sleep(0.05)
        for pid in filter(is_running, pids):
            os.kill(pid, signal.SIGKILL)

    def _write_config(self) -> None:
        host = socket.gethostname()
        control_port, *node_ports = _free_ports(self.num_nodes + 1)
        nodes = "".join(
            f"NodeName=node{i + 1} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=1000 "
            "Gres=gpu:2 State=UNKNOWN\n"
            for i, port in enumerate(node_ports)
        )
        config = CONFIG.format(host=host, folder=self.folder, control_port=control_port)
        before, partition = config.split("PartitionName", 1)
        (self.folder / "slurm.conf").write_text(f"{before}{nodes}PartitionName{partition}")
        # A count alone is refused; files that exist are taken for GPUs.
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/tty[0-1]\n")

    def _start_daemons(self) -> None:
        munge, key = self.folder / "munge", self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        places = {"key-file": key} | {f"{kind}-file": munge / f"munged.{kind}" for kind in ("pid", "log", "seed")}
        options = [f"--{name}={path}" for name, path in places.items()]
        self._run("munged", f"--socket={munge}/munge.socket", "--force", *options)
        self._run("slurmctld", "-c")
        for i in range(self.num_nodes):
            self._run("slurmd", "-N", f"node{i + 1}")
        until = time.monotonic() + 30
        while self._run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() != str(self.num_nodes):
            if time.monotonic() > until:
                raise RuntimeError(f"the virtual nodes did not come up: {self._run('sinfo', '-R')}\n{self._logs()}")
            time.sleep(0.05)

    def _run(self, program: str, *arguments: str) -> str:
        command = [_program(program) or program, *arguments]
        with ExitStack() as stack:  # a file, not a pipe: a daemon would hold the pipe open for ever
            log = stack.enter_context((self.folder / "log" / f"{program}.out").open("w+"))
            done = subprocess.run(command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, timeout=60)
            log.seek(0)
            said = log.read()
        if done.returncode != 0 and program not in ("scontrol", "sinfo"):
            raise RuntimeError(f"{program} ended with {done.returncode}: {said}")
        return said

    def _logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in self.folder.glob("log/*.log"))


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def is_running(pid: int) -> bool:
    """Say whether a process is there and no zombie, as daemons become where nothing collects them."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
