"""Detects other processes that compete for this run's CPU cores.

At each of thousands of operations a step waits for the slowest of its threads, which is always the
one whose core is shared. On two cores with one other busy process, two threads did 170 to 210
tokens/s (100 to 257 with other spin times, GOMP_SPINCOUNT) and one thread did 390; undisturbed, two
threads did 660.
"""

from __future__ import annotations

import os
import time
from typing import NamedTuple

import psutil


class Seconds(NamedTuple):
    """A reading of the clock and of two processor times, in seconds."""

    clock: float
    all: float  # processor time of all processes, on the cores that this one may use
    own: float  # processor time of this process and its children


def seconds() -> Seconds:
    """Return the current reading."""
    cores = psutil.cpu_times(percpu=True)
    usable = _usable(len(cores))
    used = sum(
        core.user + core.system + getattr(core, "nice", 0.0)
        for number, core in enumerate(cores)
        if number in usable
    )
    own = psutil.Process().cpu_times()
    children = getattr(own, "children_user", 0.0) + getattr(own, "children_system", 0.0)
    return Seconds(time.monotonic(), used, own.user + own.system + children)


def _usable(count: int) -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(count))


def crowded(before: Seconds, now: Seconds, threads: int, cores: int) -> str | None:
    """Return advice if, between two readings, other processes used so much of `cores` that
    `threads` threads do not fit next to them; otherwise None."""
    busy = ((now.all - before.all) - (now.own - before.own)) / max(now.clock - before.clock, 1e-9)
    free = max(1, cores - round(busy))
    if busy < 0.5 or threads <= free:
        return None
    return (
        f"other processes keep about {busy:.1f} of {cores} cores busy, and {threads} threads wait"
        f" for the slowest of them at every operation: threads={free} may be much faster"
    )


def available() -> int:
    """Return the number of cores that this process may use."""
    return len(_usable(os.cpu_count() or 1))
