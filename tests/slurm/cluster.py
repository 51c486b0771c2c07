"""A real SLURM on this machine: a controller and a few nodes that share it, on the loopback
interface, without systemd and cgroups."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "srun")
PARTITIONS = {
    "usual": (["n1", "n2"], "Default=YES PriorityTier=1"),
    # A job of `high` takes the node of one of `low`, which has its time of grace.
    "low": (["n3"], "PriorityTier=1 PreemptMode=REQUEUE GraceTime=30"),
    "high": (["n3"], "PriorityTier=10 PreemptMode=OFF"),
    "frail": (["n4", "n5"], "PriorityTier=1"),
}
NODES = sorted({node for nodes, _ in PARTITIONS.values() for node in nodes})
CPUS = 4  # more than there are: the jobs mostly wait


class Cluster:
    """Daemons, their files, and what a test asks them."""

    def __init__(self) -> None:
        # short: a socket's path has at most 107 characters
        self.folder = Path(tempfile.mkdtemp(prefix="graft-slurm-"))
        self.file = self.folder / "slurm.conf"
        self.daemons: dict[str, int] = {}

    def start(self) -> None:
        """Raises RuntimeError with the daemons' logs where they do not come up."""
        for name in ("state", "log", "munge"):
            (self.folder / name).mkdir()
        self.folder.chmod(0o711)
        (self.folder / "munge").chmod(0o711)
        key = self.folder / "munge/key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        self._configure(_free_ports(1 + len(NODES)))
        os.environ["SLURM_CONF"] = str(self.file)
        munge = {
            "key-file": "munge/key",
            "socket": "munge/sock",
            "seed-file": "munge/seed",
            "pid-file": "munged.pid",
            "log-file": "log/munged",
        }
        self._daemon(
            "munged",
            "--force",
            *(f"--{option}={self.folder / file}" for option, file in munge.items()),
        )
        self._daemon("slurmctld", "-c", "-f", str(self.file))
        for node in NODES:
            self._daemon("slurmd", "-c", "-f", str(self.file), "-N", node, name=f"slurmd-{node}")
        wait(
            lambda: (
                len(self.ask("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()) >= len(NODES)
            ),
            30,
            self.logs,
        )

    def _daemon(self, program: str, *arguments: str, name: str = "") -> None:
        name = name or program
        done = subprocess.run(
            [actual(program) or program, *arguments], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{program} did not start: {done.stdout}{done.stderr}")
        file = self.folder / f"{name}.pid"
        wait(lambda: file.exists() and file.read_text().strip(), 10, self.logs)
        self.daemons[name] = int(file.read_text())

    def _configure(self, ports: list[int]) -> None:
        host, folder, user = socket.gethostname().partition(".")[0], self.folder, getpass.getuser()
        values = {
            "ClusterName": "graft",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": ports[0],
            "SlurmUser": user,
            "SlurmdUser": user,
            "AuthType": "auth/munge",
            "CommunicationParameters": "NoCtldInAddrAny,NoInAddrAny",
            # A job that is queued again waits for as long as its credential lives; one that is
            # started sooner can be refused by its node, which is just ending it. Lives
            # shorter than 5 seconds count as 120.
            "AuthInfo": f"socket={folder}/munge/sock,cred_expire=5",
            "KillWait": 10,
            "StateSaveLocation": folder / "state",
            "SlurmdSpoolDir": folder / "spool-%n",
            "SlurmctldPidFile": folder / "slurmctld.pid",
            "SlurmdPidFile": folder / "slurmd-%n.pid",
            "SlurmctldLogFile": folder / "log/slurmctld",
            "SlurmdLogFile": folder / "log/slurmd-%n",
            "SlurmdParameters": "config_overrides",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "AccountingStorageType": "accounting_storage/none",
            "SwitchType": "switch/none",
            "MpiDefault": "none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU",
            "SchedulerType": "sched/backfill",
            "SchedulerParameters": "sched_interval=1,bf_interval=1,batch_sched_delay=0",
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "JobRequeue": 1,
            "ReturnToService": 2,
            "GresTypes": "gpu",
            "SlurmdTimeout": 10,
            "MinJobAge": 3600,
        }
        lines = [f"{key}={value}" for key, value in values.items()]
        for node, port in zip(NODES, ports[1:], strict=True):
            place = f"NodeHostname={host} NodeAddr=127.0.0.1 Port={port}"
            lines.append(
                f"NodeName={node} {place} CPUs={CPUS} RealMemory=4000 Gres=gpu:2 State=UNKNOWN"
            )
        lines += [
            f"PartitionName={name} Nodes={','.join(nodes)} MaxTime=60 State=UP {more}"
            for name, (nodes, more) in PARTITIONS.items()
        ]
        self.file.write_text("\n".join(lines) + "\n")
        # Two devices that every machine has: a GPU without a file is refused.
        gres = [
            f"NodeName={','.join(NODES)} Name=gpu File=/dev/{device}" for device in ("null", "zero")
        ]
        (self.folder / "gres.conf").write_text("\n".join(gres) + "\n")

    def stop(self) -> None:
        """End the jobs, the daemons, and what they have left."""
        if "slurmctld" in self.daemons:
            self.ask("scancel", "--user", getpass.getuser())
            with contextlib.suppress(TimeoutError):
                wait(lambda: not self.ask("squeue", "-h"), 20)
        for pid in _steps(self.folder):
            _end([pid, *_children(pid)])
        _end([pid for name, pid in reversed(self.daemons.items())], signal.SIGTERM)
        os.environ.pop("SLURM_CONF", None)
        shutil.rmtree(self.folder, ignore_errors=True)

    def crash(self, node: str) -> None:
        """End a node as a loss of power would: its daemon, its steps and what runs in them, without
        a word."""
        _end([self.daemons.pop(f"slurmd-{node}")])
        for pid in _steps(self.folder, node):
            _end([pid, *_children(pid)])
        self.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=crash")

    def ask(self, *command: str) -> str:
        """What a command of SLURM prints."""
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM tells of a job, or of one task of an array as JOB_TASK."""
        words = self.ask("scontrol", "show", "job", "-o", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, number: str) -> str:
        return self.job(number).get("JobState", "")

    def seconds(self, number: str) -> int:
        """The time that a job has been running."""
        hours, minutes, seconds = self.job(number)["RunTime"].split(":")
        return (int(hours) * 60 + int(minutes)) * 60 + int(seconds)

    def ended(self, number: str, timeout: float = 400) -> dict[str, str]:
        """Wait for a job's end, however often it is queued again; returns what SLURM tells of
        it."""

        since = None  # a job on its way back into the queue looks as if it had ended, for a moment

        def over() -> bool:
            nonlocal since
            if self.state(number) not in (
                "COMPLETED",
                "FAILED",
                "CANCELLED",
                "TIMEOUT",
                "NODE_FAIL",
                "PREEMPTED",
            ):
                since = None
            elif since is None:
                since = time.monotonic()
            return since is not None and time.monotonic() - since > 3

        wait(over, timeout, lambda: f"job {number} has not ended: {self.job(number)}")
        return self.job(number)

    def logs(self) -> str:
        """The end of each daemon's log."""
        texts = {
            file.name: file.read_text(errors="replace")[-1500:]
            for file in sorted((self.folder / "log").glob("*"))
        }
        return "\n".join(f"--- {name}\n{text}" for name, text in texts.items())


def actual(program: str) -> str | None:
    """Where a program is, daemons included, whose folder is not on everybody's path."""
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")


def wait(condition: Callable[[], Any], timeout: float, what: Callable[[], str] = str) -> Any:
    """Wait until `condition` gives something true, which is returned; TimeoutError tells `what` was
    found instead."""
    end = time.monotonic() + timeout
    while not (result := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"nothing within {timeout:g} s: {what()}")
        time.sleep(0.1)
    return result


def _free_ports(count: int) -> list[int]:
    taken = [socket.socket() for _ in range(count)]
    try:
        for one in taken:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in taken]
    finally:
        for one in taken:
            one.close()


def _processes() -> dict[int, tuple[int, str, dict[str, str]]]:
    """pid: (parent, command, environment) of the processes that may be looked at."""
    actual = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            words = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        actual[int(entry.name)] = (
            parent,
            command,
            dict(word.partition("=")[::2] for word in words),
        )
    return actual


def _children(pid: int) -> list[int]:
    processes = _processes()
    actual = [pid]
    for one in actual:
        actual += [child for child, (parent, *_) in processes.items() if parent == one]
    return actual[1:]


def _steps(folder: Path, node: str | None = None) -> list[int]:
    """The slurmstepd of this cluster, of one node or of all: those that hold its files
    open."""
    actual = []
    for pid, (_, command, _) in _processes().items():
        if not command.startswith("slurmstepd"):
            continue
        try:
            opened = " ".join(os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir())
        except OSError:
            continue
        if str(folder) in opened and (
            node is None or f"spool-{node}" in opened or f"slurmd-{node}" in opened
        ):
            actual.append(pid)
    return actual


def _end(pids: list[int], number: signal.Signals = signal.SIGKILL) -> None:
    """Signal some processes, and wait until they are gone."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue

    def gone() -> bool:
        for pid in pids:
            try:
                if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    return False
            except OSError:
                continue
        return True

    try:
        wait(gone, 10)
    except TimeoutError:
        if number != signal.SIGKILL:
            _end(pids)
