"""Files and folders that appear whole or not at all, even if the process is killed or the power
fails: they are written under another name in the same folder, synced, and renamed.

The other name is random and new, so that no link that a stranger has placed is written through, and
renaming replaces a link instead of following it. The writer holds a lock on what it writes. A later
writer of the same name removes what a killed one left: its lock is free.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from trainer.config import files

_MARKER = ".graft-writes"  # in a temporary folder, locked by its writer


@contextlib.contextmanager
def file(path: Path) -> Iterator[Path]:
    """Yield the path of a new temporary file, which replaces `path` if the block raises nothing."""
    with _new(path) as temporary:
        mode = temporary.stat().st_mode & 0o777
        yield temporary
        descriptor = os.open(temporary, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fchmod(descriptor, mode)  # safetensors replaces it by a file of mode 0600
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    _sync_folder(path.parent)


@contextlib.contextmanager
def _new(path: Path) -> Iterator[Path]:
    """Yield a new file next to `path`, locked. It is removed if it still has its name at the
    end."""
    _remove_leftovers(path)
    descriptor = None
    while descriptor is None:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        descriptor = _locked(temporary)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a small file, in UTF-8."""
    with file(path) as temporary:
        temporary.write_text(text, "utf-8")


def write_output(path: Path, text: str) -> None:
    """Write a file that the user names on a command line. A device such as /dev/stdout is written
    to; a link elsewhere is replaced."""
    if path.is_absolute() and path.parts[1:2] in (("dev",), ("proc",)):
        with path.open("w", encoding="utf-8") as stream:
            stream.write(text)
    else:
        write_text(path, text)


@contextlib.contextmanager
def folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed to `path` if the block raises nothing. `path` must
    not exist, or be empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _new_folder(path) as temporary:
        yield temporary
        _share(temporary, (temporary / _MARKER).stat().st_mode & 0o777)
        (temporary / _MARKER).unlink()
        os.replace(temporary, path)


def _share(folder: Path, mode: int) -> None:
    """Give a folder and all in it the modes that the umask gives; `mode` is that of a file. The
    folders of mkdtemp and the files of safetensors are readable by their owner alone."""
    for place, _, names in os.walk(folder):
        os.chmod(place, mode | (mode & 0o444) >> 2)
        for name in names:
            if not os.path.islink(path := os.path.join(place, name)):
                os.chmod(path, mode)


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder next to `path`. It is removed if it still has its name at the end."""
    _remove_leftovers(path)
    descriptor = None
    while descriptor is None:
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        descriptor = _locked(temporary / _MARKER)
    try:
        yield temporary
    finally:
        os.close(descriptor)
        shutil.rmtree(temporary, ignore_errors=True)


def _locked(path: Path) -> int | None:
    """Create a file and lock it. Return its descriptor, None if a process that cleans up was
    faster."""
    try:
        descriptor = files.create(path)
    except FileNotFoundError:
        if path.parent.name.startswith(".") and not path.parent.exists():
            return None
        raise
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # a filesystem without locks: nobody can tell then that it is a leftover
        return descriptor
    with contextlib.suppress(FileNotFoundError):
        if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
            return descriptor
    os.close(descriptor)
    return None


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files and folders of writers of `path` that were killed."""
    if not path.parent.is_dir():
        return
    with os.scandir(path.parent) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(f".{path.name}")]
    for name in names:
        rest, entry = name.removeprefix(f".{path.name}"), path.with_name(name)
        if rest.startswith(".") and rest.endswith(".tmp") and len(rest) == len(".01234567.tmp"):
            if _is_free(entry):
                entry.unlink(missing_ok=True)
        elif rest.startswith("-") and not entry.is_symlink() and _is_free(entry / _MARKER):
            shutil.rmtree(entry, ignore_errors=True)


def _is_free(path: Path) -> bool:
    """Return whether a file exists, is regular, and no process holds its lock."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return path.is_file()
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
