"""Opens files in folders that may come from a stranger.

Only regular files within a limit of bytes are read: a device or a FIFO would never end. Nothing is
written through a link: `create` opens a new file only, and `append` refuses a link.
`trainer.storage.atomic` builds on it; no other code opens a file to write.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any


class Unreadable(ValueError):
    """A file is not regular, or too large. The message names it."""


def read_bytes(file: Path, most: int) -> bytes:
    """Read a regular file of at most `most` bytes.

    Raises:
        Unreadable: it is a device, a FIFO or a socket, or has more bytes.
        OSError: it cannot be read.
    """
    if not stat.S_ISREG(os.stat(file).st_mode):  # opening a device can have effects
        raise _refusal(file)
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _refusal(file)
        content = stream.read(most + 1) if status.st_size <= most else b""
    if status.st_size > most or len(content) > most:
        raise Unreadable(f"{file} has {status.st_size:,} bytes; at most {most:,} are read")
    return content


def _refusal(file: Path) -> Exception:
    if file.is_dir():
        return IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    return Unreadable(f"{file} is a device, a FIFO or a socket: expected a regular file")


def read_text(file: Path, most: int, errors: str = "strict") -> str:
    """Read a regular file of at most `most` bytes as UTF-8.

    Raises:
        Unreadable, OSError: as `read_bytes`.
        UnicodeDecodeError: it is not UTF-8, and `errors` is strict.
    """
    return read_bytes(file, most).decode("utf-8", errors)


def create(path: Path) -> int:
    """Return the descriptor of a new file. It is an error if the name exists, also as a link.

    Raises:
        OSError: the name is taken, or the file cannot be created.
    """
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def edit(path: Path) -> Any:
    """Open an existing file to read and change its bytes.

    Raises:
        OSError: as `append`, or there is none.
    """
    return os.fdopen(_opened(path, os.O_RDWR), "rb+")


def append(path: Path) -> Any:
    """Open a text file in UTF-8 to append to it, and create it where there is none.

    Raises:
        OSError: it is a link or no regular file, or cannot be opened.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    return os.fdopen(_opened(path, flags), "a", encoding="utf-8")


def _opened(path: Path, flags: int) -> int:
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(
            errno.ELOOP, "it is a link, and nothing is written through one: remove it", str(path)
        ) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file: remove it", str(path))
    return descriptor


def place_fault(path: Path) -> str | None:
    """Say why a folder cannot be created, or a file not written into it. The folders above it need
    not exist."""
    above = next((place for place in (path, *path.parents) if os.path.lexists(place)), None)
    if above is not None and not above.is_dir():
        return f"{above} is no folder"
    if above is not None and not os.access(above, os.W_OK | os.X_OK):
        return f"the folder {above} cannot be written"
    return None


def output_fault(file: Path) -> str | None:
    """Say why a file that a command line names cannot be written."""
    if file.is_dir():
        return "it is a folder, expected the name of a file"
    if file.parts[:2] in (("/", "dev"), ("/", "proc")):
        return None if os.access(file, os.W_OK) else "it cannot be written"
    if not file.parent.is_dir():
        return f"there is no folder {file.parent}"
    return place_fault(file.parent)
