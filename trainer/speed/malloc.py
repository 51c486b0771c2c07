"""Settings of the allocators of a CPU and of a GPU.

The first is of glibc's malloc. By default it returns large freed tensors to the kernel, and gets
them back as pages that the kernel fills with zeros one by one. A training step frees and allocates
the same sizes again and again."""

from __future__ import annotations

import ctypes
import os
from collections.abc import MutableMapping

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
LARGEST = 1 << 30  # bytes of a block that is kept; larger ones still go back at once
USER_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed() -> bool:
    """Tell malloc to keep freed memory for reuse. Return False if that is not possible, or if the
    user has set one of USER_SETTINGS.

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


# The first is torch's name today; it still reads the second, with a warning.
SEGMENTS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def expand_segments(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Let torch's allocator of a GPU grow its segments, so that batches of other lengths do not
    leave holes in its memory. Call it before the first tensor on a GPU. Return False if the user
    has set one of SEGMENTS."""
    if any(name in environment for name in SEGMENTS):
        return False
    environment[SEGMENTS[0]] = "expandable_segments:True"
    return True
