"""An adapter merged into the weights while a model writes."""

from __future__ import annotations

import contextlib
from typing import Any

import psutil

from adapters.folded import folded, merge_to_write


def merged(model: Any) -> contextlib.AbstractContextManager[int]:
    """Return adapters.folded.folded of a model, if this machine has the memory for it."""
    return folded(model, psutil.virtual_memory().available)


def merge_for_good(model: Any) -> int:
    """Return how many layers adapters.folded.merge_to_write has merged, if this machine has the
    memory for it."""
    return merge_to_write(model, psutil.virtual_memory().available)
