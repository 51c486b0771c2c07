"""A lock for what one process makes and several need: rows, converted models, hidden states.

The first process makes it and the others wait, as long as it takes. The lock is the kernel's
(flock): it ends with its process, however that ends, and a lock file that was left behind locks
nothing. It needs no torch.distributed, whose messages time out.

Some shared filesystems have no flock. There filelock takes the file itself for the lock, with the
holder's process number and host in it. It removes a lock of a dead process of this host. Whether a
process of another host is alive cannot be known here, so the messages name it, and the file.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

WAIT = 30.0  # seconds between two messages of a process that waits for another one


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[bool]:
    """Hold a lock while making `what`. Yield whether another process held it before."""
    lock, waited = FileLock(path), 0
    while True:
        try:
            lock.acquire(timeout=WAIT if waited else 0)
            break
        except Timeout:
            if waited:
                log.info(
                    "%s: another process has been making this for %d s; waiting for it%s",
                    what,
                    waited * WAIT,
                    _holder(path),
                )
            waited += 1
    try:
        yield waited > 0
    finally:
        lock.release()


def _holder(path: Path) -> str:
    """Name the process that holds a lock on a filesystem without flock; empty with flock."""
    try:
        lines = path.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    if len(lines) < 2 or not lines[0].isdigit():
        return ""
    return f" (process {lines[0]} of {lines[1][:64]!r}. If it has ended, delete {path})"
