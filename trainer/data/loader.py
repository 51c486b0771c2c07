"""Batches from processes of their own, none of which is waited for without end."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader


class LoadingError(RuntimeError):
    """A data loading process does not answer. The message says what to do."""


class Loader(DataLoader):
    """A DataLoader whose processes are ended when a batch takes longer than `minutes`, where that
    is not 0.

    DataLoader's own timeout ends the wait for a batch's description, not that for its tensors,
    which a process that is stopped never hands over; nor does it end the process, for which this
    one would then wait at its own end.

    Raises:
        LoadingError: when iterated, and a process is late.
    """

    def __init__(self, *given: Any, minutes: float, **named: Any):
        super().__init__(*given, **named)
        self.minutes = minutes

    def __iter__(self) -> Any:
        batches = super().__iter__()
        return batches if self.num_workers == 0 else self._watched(batches)

    def _watched(self, batches: Any) -> Iterator[Any]:
        while True:
            late = threading.Event()
            timer = threading.Timer(60 * self.minutes, _end, (batches, late))
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
                        "a data loading process has not answered for"
                        f" loading_timeout={self.minutes:g} minutes. Look at the disk that the data"
                        " and the cache are on; set loading_timeout higher if a batch does take so"
                        " long, or workers=0; and go on with resume=auto"
                    ) from None
                raise
            finally:
                timer.cancel()
            yield batch


def _end(batches: Any, late: threading.Event) -> None:
    late.set()
    for process in batches._workers:
        process.kill()


def _wait(batches: Any) -> None:
    for process in batches._workers:
        # torch's word for the end of a process may come later than that of its pipe.
        with contextlib.suppress(RuntimeError):
            process.join()


def killed(error: BaseException) -> str | None:
    """What to do about a process that was ended from outside, if this is torch's word for it, which
    comes wherever the run is."""
    text = str(error).strip().rstrip(".")
    if not isinstance(error, RuntimeError) or not text.startswith("DataLoader worker"):
        return None
    return (
        f"a data loading process was ended from outside, most likely for want of memory ({text})."
        " Set workers=0, or give the job more memory, and go on with resume=auto"
    )
