"""How the time of a function grows with its input."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

SIZE = 20_000  # characters
LIMIT = 0.25  # seconds of computing for a quarter of them


def seconds(function: Callable[[Any], Any], value: Any) -> float:
    """The processor time of a call."""
    started = time.process_time()
    function(value)
    return time.process_time() - started


def assert_linear(
    function: Callable[[Any], Any], of_size: Callable[[int], Any], size: int = SIZE
) -> None:
    """Double the input twice: four times the input takes at most seven times as long, where a
    square takes sixteen times. Times below a few milliseconds are noise."""
    small, large = (
        min(seconds(function, value) for _ in range(2))
        for value in (of_size(size), of_size(4 * size))
    )
    assert large < max(7 * small, 0.05), f"{size:,}: {small:.3f} s, {4 * size:,}: {large:.3f} s"
