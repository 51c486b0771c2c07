"""Work that the tests of a process share or leave out, where it is not what a test looks at.

Files are not flushed to the disk: only a power cut shows the difference, and
tests/storage/test_checkpoints.py checks which calls there are. The speed of products on a CPU is
measured by the first run alone; tests/models/test_flops.py measures it again. The garbage collector
does not look at what imports have created.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
from typing import Any

MANY = 300  # modules, after whose import the collector skips what is there

loaded = 0


def not_flushed(descriptor: Any) -> None:
    """Stand in for os.fsync."""


def install() -> None:
    """Leave flushing out in this process."""
    os.fsync = not_flushed


def between_tests() -> None:
    """Treat what the test before has imported."""
    global loaded
    flops: Any = sys.modules.get("trainer.models.flops")
    if flops is not None and not hasattr(flops.peak, "measured"):
        flops.peak = measured_once(flops.peak)
    if len(sys.modules) > loaded + MANY:
        loaded = len(sys.modules)
        gc.collect()
        gc.freeze()


def measured_once(peak: Any) -> Any:
    """trainer.models.flops.peak, which keeps what it has measured on a CPU."""
    kept = functools.cache(peak)

    def of(device: Any, dtype: Any) -> tuple[float, str]:
        return (kept if device.type == "cpu" else peak)(device, dtype)

    of.measured = peak  # type: ignore[attr-defined]
    return of
