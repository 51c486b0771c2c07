"""Two processes of DDP, one of which is killed or stops responding: the other has to exit soon."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil

from scripts.faults import cases, warm
from scripts.faults.cases import EVERY, Place
from scripts.faults.ledger import Ledger

TIMEOUT = 1.0  # minutes: lightning.timeout, for the faults where it ends the run
LIMIT = 60 * TIMEOUT + 60.0  # seconds in which the run has to end
FAULTS = (
    ("the second process is killed", 1, signal.SIGKILL),
    ("the first process is killed", 0, signal.SIGKILL),
    ("the second process stops answering", 1, signal.SIGSTOP),
)


def inject(place: Place, ledger: Ledger) -> None:
    """Inject each fault into runs that Lightning starts, and one into a run of torchrun."""
    torchrun = ("the second process is killed, under torchrun", 1, signal.SIGKILL)
    for fault, rank, number in (*FAULTS, torchrun):
        if not ledger.due("ranks", "lora", fault):
            continue
        one(place, ledger, fault, rank, number, fault.endswith("torchrun"))


def one(place: Place, ledger: Ledger, fault: str, rank: int, number: int, torchrun: bool) -> None:
    """Send a signal to one of the processes in the middle of training. Record how the other one
    ends, and the result of the run after a resume."""
    if not (place.runs / "ranks-alone" / "report.html").exists():
        started(place, "ranks-alone", False).communicate(timeout=600)
    name = cases.cleared(place, f"ranks-{fault.replace(' ', '-').replace(',', '')}")
    run = place.runs / name
    process = started(
        place,
        name,
        torchrun,
        *([f"lightning.timeout={TIMEOUT}"] if number == signal.SIGSTOP else []),
    )
    members: list[psutil.Process] = []
    while process.poll() is None and not (len(members) == 2 and _logged(run) > EVERY + 1):
        members = _members(process.pid)
        time.sleep(0.02)
    if process.poll() is not None:
        output = process.communicate()[0][-800:]
        ledger.add("ranks", "lora", fault, said=f"it ended by itself: {output}", ok=False)
        return
    seconds = _struck(members, rank, number)
    for member in _members(process.pid) + members:
        if member.is_running():
            member.kill()
    text = process.communicate(timeout=60)[0]
    code, gone = process.returncode, cases.lost(place, name)
    again = started(place, name, torchrun)
    text_again = again.communicate(timeout=600)[0]
    same = again.returncode == 0 and cases.outcome(place, "lora", name) == cases.outcome(
        place, "lora", "ranks-alone"
    )
    explained = "Traceback" not in text or "another process" in text
    message = next(
        (
            line.strip()
            for line in text.splitlines()
            if "another process" in line or "process of this run" in line
        ),
        text.strip().splitlines()[-1][:200],
    )
    if again.returncode:
        message += " | resumed: " + text_again[-500:]
    # The code may be a signal's, if the signal goes to the process that is waited for.
    ok = seconds < LIMIT and code != 0 and same and gone <= EVERY and explained
    ledger.add(
        "ranks",
        "lora",
        fault,
        code=code,
        seconds=round(seconds, 1),
        lost=gone,
        said=f"after {seconds:.0f} s: {message}",
        same=same,
        ok=ok,
    )


def _struck(members: list[psutil.Process], rank: int, number: int) -> float:
    """Send a signal to one process; return the seconds until the other one ends."""
    members[rank].send_signal(number)
    began = time.monotonic()
    other = members[1 - rank]
    while (
        other.is_running()
        and other.status() != psutil.STATUS_ZOMBIE
        and time.monotonic() - began < LIMIT
    ):
        time.sleep(0.05)
    return time.monotonic() - began


def started(place: Place, name: str, torchrun: bool, *settings: str) -> subprocess.Popen[str]:
    """Start a run of two processes."""
    more = [
        "lightning=cpu",
        "lightning.strategy=ddp",
        "lightning.devices=2",
        "accumulate=1",
        "callbacks.evaluation.generate=0",
        "callbacks.evaluation.samples=0",
    ]
    head = (
        [
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--master_port=29611",
            "-m",
            "trainer",
        ]
        if torchrun
        else ["-m", "trainer"]
    )
    command = [sys.executable, *head, *cases.words(place, "lora", name, *more, *settings)]
    environment = os.environ | warm.ENVIRONMENT | place.cache("ranks")
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def _members(pid: int) -> list[psutil.Process]:
    """Return the processes of a run in the order of their ranks."""
    by_rank = {}
    try:
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            words = process.cmdline()
            if "torch.distributed.run" in words or not {"trainer", "trainer.__main__"} & {*words}:
                continue
            by_rank[int(process.environ().get("LOCAL_RANK", "0"))] = process
    except psutil.Error:
        return []
    return [by_rank[rank] for rank in sorted(by_rank)]


def _logged(run: os.PathLike[str]) -> int:
    from pathlib import Path

    from trainer.storage import journal

    return max(
        (row["step"] for row in journal.read(Path(run) / "metrics.jsonl") if row["kind"] == "step"),
        default=0,
    )
