"""Signals that stop a run: recorded on arrival, handled at the end of a step."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

STDERR = 2
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Signals:
    """Records SIGINT, SIGTERM, SIGUSR1 and SIGUSR2. A second SIGINT stops the process at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        # False before training: a signal ends the process at once, since there is no step to finish
        self.deferred = False
        self.cool: Callable[[], None] | None = None  # called on SIGUSR2 instead of stopping
        self._handlers: dict[int, Any] = {}  # those before this object

    def __enter__(self) -> Signals:
        self._handlers = {number: signal.getsignal(number) for number in HANDLED}
        self.install()
        return self

    def __exit__(self, *_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def install(self) -> None:
        """Install the handlers, again after Lightning and submitit have installed theirs."""
        if threading.current_thread() is threading.main_thread():
            for number in HANDLED:
                signal.signal(number, self._record)

    def restart(self) -> None:
        """Handle signals as before training, for a run that starts again in this process."""
        self.deferred, self.cool = False, None
        self.install()

    def ignore(self) -> None:
        """Ignore further signals. The run is saved; requeueing sends one more signal, which must
        not change the exit code."""
        if threading.current_thread() is threading.main_thread():
            for number in HANDLED:
                signal.signal(number, signal.SIG_IGN)
            self._handlers = {}  # so that they are not restored

    def _record(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR2 and self.cool is not None:
            self.cool()
            return
        again = self.received is not None
        self.received = number
        name = signal.Signals(number).name
        if not self.deferred or (again and number == signal.SIGINT):
            raise SystemExit(128 + number)
        # Not by logging: the signal may have come while a line is logged, and streams and locks of
        # logging cannot be entered twice.
        text = (
            f"{name}: the current step is finished, then the run is saved and stops"
            f"{'; press Ctrl-C again to stop at once' * (number == signal.SIGINT)}\n"
        )
        with contextlib.suppress(OSError):
            os.write(STDERR, text.encode())
