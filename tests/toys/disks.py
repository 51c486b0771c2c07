"""A disk that is full when what was written reaches it."""

from __future__ import annotations

import errno


def full_disk(*_: object) -> None:
    """Stands in for os.fsync."""
    raise OSError(errno.ENOSPC, "No space left on device")
