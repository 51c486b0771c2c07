"""The door for folders and files that may come from a stranger, or may be damaged.

Every command that is given a folder passes it through `enter` before it reads or writes there. What
is read is a regular file of limited size, and its content has the shape that its reader expects:
`json_file` for what a run needs, `decoration` for what only helps, such as the files of a report.
Decorations that cannot be used are left out with a warning. `set_aside` renames a damaged file, so
that a new one can be written; nothing is deleted.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from trainer.config import files, limits
from trainer.config.shapes import MAYBE_NUMBER as MAYBE_NUMBER
from trainer.config.shapes import NUMBER as NUMBER
from trainer.config.shapes import mismatch as mismatch
from trainer.config.shown import shown

log = logging.getLogger("trainer")

JSON_BYTES = 64 << 20  # of a file that is read whole


class FolderError(RuntimeError):
    """The run folder cannot be used. The message says why and how to fix it."""


def refuse_existing(path: Path, fix: str) -> None:
    """Refuse an output that exists already, or cannot be written. `fix` is the option that names
    another.

    Raises:
        FolderError: it exists, if only as a link that leads nowhere, or its place is no folder that
        can be written.
    """
    if path.exists() or path.is_symlink():
        raise FolderError(f"{path} exists. Remove it, or choose another with {fix}")
    if (fault := files.place_fault(path.parent)) is not None:
        raise FolderError(f"{path}: {fault}. Choose another place with {fix}")


def enter(folder: Path, passed: str = "wandb") -> None:
    """Refuse a folder with a symbolic link that leads out of it, or with an entry that is neither a
    file nor a folder: reading it could have no end, and writing to it would write elsewhere.

    wandb/ is exempt: W&B links its logs to the user's cache, and a run never writes into the wandb
    folder of an earlier start.

    Raises:
        FolderError: names the entry.
    """
    if (fault := limits.strange_entry(folder, passed)) is not None:
        raise FolderError(fault)


def refuse_devices(folder: Path) -> None:
    """Refuse a folder with an entry that leads to a device, a FIFO or a socket. Its links may lead
    out, as those of the hub's cache do.

    Raises:
        FolderError: names the entry.
    """
    if (fault := limits.strange_entry(folder, links=True)) is not None:
        raise FolderError(fault)


def json_file(file: Path, shape: Any, most: int = JSON_BYTES) -> Any:
    """Return the content of a JSON file that has the given shape; see `mismatch`.

    Raises:
        FileNotFoundError: there is none.
        ValueError, OSError: it cannot be read, is no JSON, or has another shape. The message names
            the place.
    """
    content = parse(files.read_text(file, most))
    if (fault := mismatch(content, shape)) is not None:
        raise ValueError(fault)
    return content


def parse(text: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def decoration(file: Path, shape: Any, default: Any) -> Any:
    """Return the content of a JSON file that only helps; `default`, with a warning, if it is
    damaged, and without one if it does not exist."""
    try:
        return json_file(file, shape)
    except FileNotFoundError:
        return default
    except (OSError, ValueError) as error:
        log.warning("%s is damaged (%s) and is left out", file, shown(reason(error)))
        return default


def set_aside(file: Path, fault: str) -> Path:
    """Rename a damaged file, and log a warning that names both. Return its new path."""
    number, aside = 1, file.with_name(f"{file.name}.damaged")
    while os.path.lexists(aside):
        number += 1
        aside = file.with_name(f"{file.name}.damaged-{number}")
    file.rename(aside)
    log.warning("%s is damaged (%s): it was renamed to %s", file, shown(fault), aside.name)
    return aside


def reason(error: Exception) -> str:
    """Return what is wrong, without the name of the file where the system says it."""
    return str(getattr(error, "strerror", None) or error)
