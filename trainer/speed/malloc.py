"""What glibc's malloc does with memory that is freed: by default large tensors are given back to
the kernel, and come back as pages that it fills with zeros one by one. A training step frees and
takes the same sizes again and again."""

from __future__ import annotations

import ctypes
import os

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
LARGEST = 1 << 30  # bytes of a block that is kept; larger ones still go back at once
USER_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed() -> bool:
    """Let the process keep what it frees for its next allocations; whether that could be done.
    Whoever sets one of USER_SETTINGS decides.

    One LoRA step of SmolLM2 on one CPU core (4 x 256, bf16) takes 3.4 instead of 4.0 seconds of
    processor time, and 2 % more memory at its peak: the kernel no longer clears 600 MB of pages in
    each.
    """
    if any(name in os.environ for name in USER_SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library
        return False
    return bool(mallopt(_MMAP, LARGEST)) and bool(mallopt(_TRIM, 2**31 - 1))
