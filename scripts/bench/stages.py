"""The processor time of each stage of a program."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any


class Stages:
    """Processor time of watched functions, without the time of other watched functions that they
    call."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.open: list[str] = []
        self.since = time.process_time()

    def _turn(self) -> None:
        now = time.process_time()
        if self.open:
            self.seconds[self.open[-1]] = self.seconds.get(self.open[-1], 0.0) + now - self.since
        self.since = now

    @contextlib.contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Count the time inside the context as `name`."""
        self._turn()
        self.open.append(name)
        try:
            yield
        finally:
            self._turn()
            self.open.pop()

    def watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, with its time counted as `name`."""

        @functools.wraps(function)
        def counted(*arguments: Any, **named: Any) -> Any:
            with self.within(name):
                return function(*arguments, **named)

        return counted

    def each(
        self, name: str, function: Callable[..., Iterator[Any]]
    ) -> Callable[..., Iterator[Any]]:
        """Return a function whose result is an iterator, with each step counted as `name`."""

        @functools.wraps(function)
        def counted(*arguments: Any, **named: Any) -> Iterator[Any]:
            steps = iter(function(*arguments, **named))
            while True:
                with self.within(name):
                    try:
                        item = next(steps)
                    except StopIteration:
                        return
                yield item

        return counted
