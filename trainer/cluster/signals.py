"""Signals that ask a run to stop: noted on arrival, handled at the end of a step."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

NOTED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Signals:
    """Notes SIGINT, SIGTERM, SIGUSR1 and SIGUSR2. A second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        # while False a signal ends the process at once, since there is no step to finish
        self.deferred = False
        self.cool: Callable[[], None] | None = None  # what SIGUSR2 asks for instead of stopping
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self._before = {number: signal.getsignal(number) for number in NOTED}
        self.install()
        return self

    def __exit__(self, *_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def install(self) -> None:
        """Install the handlers, again after Lightning and submitit have installed theirs."""
        if threading.current_thread() is threading.main_thread():
            for number in NOTED:
                signal.signal(number, self._note)

    def ignore(self) -> None:
        """Ignore further signals. The run is saved; requeueing sends one more signal, which must
        not change the exit code."""
        if threading.current_thread() is threading.main_thread():
            for number in NOTED:
                signal.signal(number, signal.SIG_IGN)
            self._before = {}  # for good

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR2 and self.cool is not None:
            self.cool()
            return
        again = self.received is not None
        self.received = number
        name = signal.Signals(number).name
        if not self.deferred or (again and number == signal.SIGINT):
            raise SystemExit(128 + number)
        log.warning(
            "%s: the step at hand is finished, then the run is saved and stops%s",
            name,
            "; press Ctrl-C again to stop at once" * (number == signal.SIGINT),
        )
