"""The number of CPU threads of a run, by the cores that are free; and how waiting threads wait.

On two cores with one busy process, two threads did 170 to 210 tokens/s and one did 390
(trainer.speed.cpu_load). A waiting thread of OpenMP spins, and takes the core of the thread that it
waits for: 244 to 257 tokens/s with a short spin. Undisturbed, a short spin costs 22 %, so it
is for machines with other work alone.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path

from trainer.speed import cpu_load
from trainer.speed.cpu_load import Seconds

log = logging.getLogger("trainer")

WINDOW = 0.5  # seconds over which other processes are watched at least
BUSY = 0.5  # cores in use by others that count as other work
# How long a waiting thread spins: of GNU's OpenMP in turns, of Intel's and LLVM's in milliseconds.
# torch's wheels have GNU's on Linux. They are read when torch is imported.
SHORT_SPIN = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "1"}
USER_SETTINGS = (*SHORT_SPIN, "OMP_WAIT_POLICY")


def busy(before: Seconds, now: Seconds) -> float:
    """Return how many cores other processes used between two readings."""
    used = (now.all - before.all) - (now.own - before.own)
    return max(0.0, used) / max(now.clock - before.clock, 1e-9)


def let_waiting_yield(before: Seconds, environment: MutableMapping[str, str] = os.environ) -> bool:
    """Shorten the spin of waiting threads if other processes are busy. Call it before torch is
    imported. Return False if nobody is busy, there is one thread, or the user has decided."""
    if (
        "torch" in sys.modules
        or environment.get("OMP_NUM_THREADS") == "1"
        or any(name in environment for name in USER_SETTINGS)
        or busy(before, cpu_load.seconds()) < BUSY
    ):
        return False
    environment.update(SHORT_SPIN)
    return True


def choose(before: Seconds, most: int) -> tuple[int, str]:
    """Return the number of threads, at most `most`, that the free cores allow, and why. It waits
    until the reading `before` is WINDOW old."""
    if most == 1:
        return 1, "torch has one"
    time.sleep(max(0.0, WINDOW - (time.monotonic() - before.clock)))
    others, cores, share = busy(before, cpu_load.seconds()), cpu_load.available(), quota()
    free = cores - (round(others) if others >= BUSY else 0)
    reason = f"{cores} cores, of which other processes use {others:.1f}"
    if share is not None and share < free:
        free = math.ceil(share)
        reason = f"the control group allows {share:g} of {cores} cores"
    return max(1, min(most, free)), reason


def quota(
    own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> float | None:
    """Return how many cores the control groups of this process allow it, None without a limit."""
    try:
        lines = own.read_text("utf-8").splitlines()
    except OSError:
        return None
    shares: list[float] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        folder = root / controllers / path.lstrip("/") if controllers else root / path.lstrip("/")
        top = root / controllers if controllers else root
        # The path may be that of the host, of which a container sees the end alone.
        for place in {*_up_to(folder, top), top}:
            shares += _share(place)
    return min(shares, default=None)


def _up_to(folder: Path, top: Path) -> list[Path]:
    return [place for place in (folder, *folder.parents) if place.is_relative_to(top)]


def _share(folder: Path) -> list[float]:
    """Return the limit of a control group of version 2 or 1, as a list of one or none."""
    try:
        if (file := folder / "cpu.max").exists():
            limit, period = file.read_text("utf-8").split()
        else:
            limit = (folder / "cpu.cfs_quota_us").read_text("utf-8").strip()
            period = (folder / "cpu.cfs_period_us").read_text("utf-8")
        if limit in ("max", "-1"):
            return []
        return [int(limit) / int(period)]
    except (OSError, ValueError, ZeroDivisionError):
        return []
