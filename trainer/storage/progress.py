"""Logs the progress of long work.

In a log file of SLURM or CI, which shows no progress bar, long work looks as if it hangs.
`Progress` writes a line every 15 seconds:

    evaluation: 120 of 480 rows, 2:05 left
    answers: 16 of 40 rows, 37 of 128 tokens of the next, 4:10 left

A thread writes it, so that a slow batch does not delay it. A run writes to its log, on rank 0; a
command, which has no log, writes to stderr. Of nested work only the innermost is reported.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self, TypeVar

from trainer.config.shown import say

log = logging.getLogger("trainer")

EVERY = 15.0  # seconds between two lines
T = TypeVar("T")


_open: list[Progress] = []  # the outermost first


class Progress:
    """Logs progress while it is open. `total` = None is unknown; `done` was finished earlier. Work
    that takes less than `every` seconds is not mentioned."""

    def __init__(
        self,
        what: str,
        total: int | None = None,
        unit: str = "",
        done: int = 0,
        every: float = EVERY,
        now: Callable[[], float] = time.monotonic,
    ):
        self.what, self.total, self.unit = what, total, unit
        self.every, self.now = every, now
        self.done = self.done_before = done
        self.started = self.spoke = now()
        self._part, self._share = "", 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._report, daemon=True, name=f"progress: {what}")

    def __enter__(self) -> Self:
        self.started = self.spoke = self.now()
        _open.append(self)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._closed.set()
        self._thread.join()
        _open.remove(self)
        if _open:  # what was reported inside counts
            _open[-1].spoke = max(_open[-1].spoke, self.spoke)

    def advance(self, count: int = 1) -> None:
        """Count finished work."""
        self.done += count
        self._part, self._share = "", 0.0

    def within(self, done: int, total: int, unit: str, count: int = 1) -> None:
        """Say how far the next `count` pieces of work are: `done` of `total` units."""
        self._part = f", {done:,} of {total:,} {unit} of the next"
        self._share = count * done / total

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, and count each when the next one is requested."""
        for item in items:
            yield item
            self.advance()

    def line(self) -> str:
        """Return how much is done, and how long the rest takes at the speed so far."""
        unit = f" {self.unit}" if self.unit else ""
        seconds, part = self.now() - self.started, self._part
        if self.total is None:
            count = f"{self.done:,}{unit}{part}, " if self.done or unit else ""
            return f"{self.what}: {count}{clock(seconds)} so far"
        text = f"{self.what}: {self.done:,} of {self.total:,}{unit}{part}"
        finished = self.done - self.done_before + self._share
        if not finished:
            return f"{text}, {clock(seconds)} so far"
        left = seconds / finished * max(0.0, self.total - self.done - self._share)
        return f"{text}, {clock(left)} left"

    def _report(self) -> None:
        wait = self.every
        while not self._closed.wait(wait):
            wait = self.spoke + self.every - self.now()
            if wait <= 0:
                wait = self.every
                if _open[-1:] == [self]:
                    self.spoke = self.now()
                    _say(self.line())


def current() -> Progress | None:
    """Return the innermost work that is open."""
    return _open[-1] if _open else None


def _say(line: str) -> None:
    if log.isEnabledFor(logging.INFO):
        log.info("%s", line)
    elif log.level == logging.NOTSET:  # no run has set logging up; ranks other than 0 set WARNING
        say(line, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Return minutes and seconds, as in 12:05."""
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"
