"""Wall time of work on a device, split by name."""

from __future__ import annotations

import time
from typing import Any

import torch


def now(device: torch.device) -> float:
    """Wait until the device has finished its work, and return a clock's seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def working(device: torch.device) -> float:
    """As `now`, but in processor seconds for one thread of a CPU: other programs do not change
    them."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if alone else now(device)


class Clock:
    """Seconds spent, by name. Laps on a GPU are CUDA events: the device is waited for only when
    seconds are read."""

    def __init__(self, device: torch.device):
        self.device, self.spent = device, dict[str, float]()
        self.pending: list[tuple[str, Any, Any]] = []
        self.started = now(device)
        self.last = self._mark()

    def lap(self, name: str) -> float:
        """Add the time since the last lap to `name`. Return the seconds since the start, without
        waiting for the device."""
        mark = self._mark()
        self.pending.append((name, self.last, mark))
        self.last = mark
        return time.perf_counter() - self.started

    def of(self, name: str) -> float:
        """Return the seconds of all laps of this name."""
        now(self.device)
        for lap, first, last in self.pending:
            seconds = (
                first.elapsed_time(last) / 1000 if self.device.type == "cuda" else last - first
            )
            self.spent[lap] = self.spent.get(lap, 0.0) + seconds
        self.pending.clear()
        return self.spent.get(name, 0.0)

    def seconds(self) -> float:
        """Return the seconds since the start."""
        return now(self.device) - self.started

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event
