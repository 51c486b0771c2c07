"""An adapter merged into the weights while a model writes."""

from __future__ import annotations

import contextlib
from typing import Any

import psutil

from adapters.folded import folded


def merged(model: Any) -> contextlib.AbstractContextManager[int]:
    """Return adapters.folded.folded of a model, if this machine has the memory for it."""
    return folded(model, psutil.virtual_memory().available)
