"""Batches from worker processes, with a limit on the time that a batch may take."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader


class LoadingError(RuntimeError):
    """A data loading process does not respond. The message says what to do."""


class Loader(DataLoader):
    """A DataLoader that kills its worker processes when a batch takes longer than `minutes`. 0 sets
    no limit.

    DataLoader's own timeout ends the wait for the description of a batch, but not the wait for its
    tensors, which a stopped process never sends. It does not end the process either, which the main
    process would then wait for at its exit.

    Raises:
        LoadingError: while iterating, if a process is late.
    """

    def __init__(self, *arguments: Any, minutes: float, **options: Any):
        super().__init__(*arguments, **options)
        self.minutes = minutes

    def __iter__(self) -> Any:
        batches = super().__iter__()
        return batches if self.num_workers == 0 else self._with_time_limit(batches)

    def _with_time_limit(self, batches: Any) -> Iterator[Any]:
        while True:
            late = threading.Event()
            timer = threading.Timer(60 * self.minutes, _kill, (batches, late))
            timer.daemon = True
            if self.minutes:
                timer.start()
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError):
                if late.is_set():
                    _wait(batches)
                    raise LoadingError(
                        "a data loading process has not responded for"
                        f" loading_timeout={self.minutes:g} minutes. Check the disk of the data and"
                        " the cache; set a higher loading_timeout if batches really take so long,"
                        " or workers=0; then resume with resume=auto"
                    ) from None
                raise
            finally:
                timer.cancel()
            yield batch


def _kill(batches: Any, late: threading.Event) -> None:
    late.set()
    for process in batches._workers:
        process.kill()


def _wait(batches: Any) -> None:
    for process in batches._workers:
        # torch may raise its error about the killed process only now.
        with contextlib.suppress(RuntimeError):
            process.join()


def killed(error: BaseException) -> str | None:
    """Return what to do if `error` is torch's report of a killed worker process, else None. torch
    raises it wherever the main process happens to be."""
    text = str(error).strip().rstrip(".")
    if not isinstance(error, RuntimeError) or not text.startswith("DataLoader worker"):
        return None
    return (
        f"a data loading process was killed from outside, most likely out of memory ({text})."
        " Set workers=0, or give the job more memory, and resume with resume=auto"
    )
