"""Whether other processes keep the cores busy that a run on a CPU counts on.

A step waits for the slowest of its threads at each of thousands of operations, and the one whose
core is shared is the slowest at all of them: on two cores beside one busy process, two threads did
170 to 210 tokens/s (100 to 257 with other times of spinning, GOMP_SPINCOUNT) and one thread 390;
undisturbed, two did 660.
"""

from __future__ import annotations

import os
import time
from typing import NamedTuple

import psutil


class Seconds(NamedTuple):
    """What had been used when they were taken: by the clock, by all processes on this one's cores,
    and by this one."""

    clock: float
    all: float
    own: float


def seconds() -> Seconds:
    """As of now."""
    each = psutil.cpu_times(percpu=True)
    used = sum(
        core.user + core.system + getattr(core, "nice", 0.0)
        for n, core in enumerate(each)
        if n in _mine(len(each))
    )
    own = psutil.Process().cpu_times()
    children = getattr(own, "children_user", 0.0) + getattr(own, "children_system", 0.0)
    return Seconds(time.monotonic(), used, own.user + own.system + children)


def _mine(count: int) -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(count))


def crowded(then: Seconds, now: Seconds, threads: int, cores: int) -> str | None:
    """What to do where others have used so much between two moments that `threads` do not fit
    beside them; else None."""
    busy = ((now.all - then.all) - (now.own - then.own)) / max(now.clock - then.clock, 1e-9)
    free = max(1, cores - round(busy))
    if busy < 0.5 or threads <= free:
        return None
    return (
        f"other processes keep about {busy:.1f} of {cores} cores busy, and {threads} threads wait"
        f" for the slowest of them at every operation: threads={free} may be faster by far"
    )


def available() -> int:
    """Cores that this process may use."""
    return len(_mine(os.cpu_count() or 1))
