"""Checkpoints that are whole or not there, and belong to their run.

`step-00000040.ckpt` holds trainable tensors, optimiser, counters and callbacks;
`step-00000040.json`, written last, holds its
digest and is the sign that it is complete. Both are written under another name in the same folder,
synced and renamed: Lightning's own saving goes through $TMPDIR, which on clusters is another
filesystem, and a full disk there costs the last good file.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from tasks.wheel import sha256
from trainer.storage.atomic import _sync_folder, write_text

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read. The message says which, why, and what is left."""


def save(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint as the module's text says.

    Raises:
        CheckpointError: it holds numbers that are not finite, or cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _refuse_nonfinite(content, path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        manifest = {
            "step": content["counters"]["step"],
            "bytes": temporary.stat().st_size,
            "sha256": sha256(temporary),
        }
        os.replace(temporary, path)
        _sync_folder(path.parent)
        write_text(path.with_suffix(".json"), json.dumps(manifest | {"written": time.time()}))
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        # torch says it of a lost process wherever the run is
        if str(error).startswith("DataLoader worker"):
            raise
        raise CheckpointError(_cannot_write(path, error)) from error


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step-{step:08d}.ckpt"


def _refuse_nonfinite(checkpoint: dict[str, Any], path: Path) -> None:
    for name, tensor in (checkpoint["adapter"]["tensors"] | checkpoint.get("drafter", {})).items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{name} holds NaN or infinite values, so {path.name} was not written. The"
                " checkpoints before it are untouched"
            )


def _cannot_write(path: Path, error: Exception) -> str:
    free = shutil.disk_usage(path.parent).free
    if (
        getattr(error, "errno", None) == errno.ENOSPC
        or free < 1 << 20
        or "unexpected pos" in str(error)
    ):
        reason = f"the disk is full ({free / 1e6:.1f} MB free). Free some space"
    elif isinstance(error, OSError):
        reason = f"{error.strerror or error}. Mend that"
    else:
        reason = f"{error}. Mend that"
    kept = complete(path.parent)
    left = f"{kept[-1].name} before it is untouched" if kept else "there was none before it"
    return f"{path} could not be written: {reason}, and go on with resume=auto; {left}"


def complete(folder: Path) -> list[Path]:
    """Checkpoints whose manifest was written, oldest first. Leftovers of an interrupted save are
    not among them."""
    names = (re.fullmatch(r"step-(\d{8})\.json", path.name) for path in folder.glob("step-*.json"))
    return [
        path_of(folder, step) for step in sorted(int(match.group(1)) for match in names if match)
    ]


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint's file, if anything."""
    try:
        manifest = json.loads(path.with_suffix(".json").read_text())
        if path.stat().st_size != manifest["bytes"]:
            return f"it has {path.stat().st_size} bytes instead of {manifest['bytes']}"
        if sha256(path) != manifest["sha256"]:
            return "its content has changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError):
        return "its manifest cannot be read"
    return None


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that is as it was written; damaged ones are passed over with a warning.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged: starting over would be a guess.
    """
    found = complete(folder)
    faults = []
    for path in reversed(found):
        reason = fault(path)
        if reason is None:
            return path
        log.warning("%s is damaged (%s) and was passed over", path.name, reason)
        faults.append(f"{path}: {reason}")
    if found:
        raise CheckpointError(
            "every checkpoint of this run is damaged:\n"
            + "\n".join(faults)
            + "\nRestore one, or start anew with another name="
        )
    return None


def load(path: Path) -> dict[str, Any]:
    """A checkpoint's content, on the CPU. Only tensors and plain data are read; no pickled code
    ever runs.

    Raises:
        CheckpointError: it is damaged or missing.
    """
    reason = fault(path)
    if reason is not None:
        raise CheckpointError(f"{path} cannot be used: {reason}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        first = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path} cannot be used: it is no checkpoint of tensors and plain data ({first})"
        ) from None


def remove(path: Path) -> None:
    """Remove a checkpoint, its manifest first, so that what is left of it counts as incomplete."""
    path.with_suffix(".json").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what interrupted saves left behind."""
    keep = set(complete(folder))
    for path in [
        *folder.glob("*.tmp"),
        *(path for path in folder.glob("step-*.ckpt") if path not in keep),
    ]:
        path.unlink(missing_ok=True)


def marked(folder: Path, name: str) -> Path | None:
    """The checkpoint that NAME.json marks, as best or as the last of the constant phase; None if
    none is."""
    file = folder / f"{name}.json"
    return path_of(folder, json.loads(file.read_text())["step"]) if file.exists() else None


def chosen(folder: Path, which: str) -> Path:
    """The checkpoint that `last`, `best` or a step's number means.

    Raises:
        CheckpointError: there is no such checkpoint; the message lists what there is.
    """
    found = complete(folder)
    steps = ", ".join(str(int(path.stem[5:])) for path in found) or "none"
    if which == "last":
        path = newest(folder)
    elif which == "best":
        path = marked(folder, "best") or newest(folder)
    elif which.isdecimal():
        path = path_of(folder, int(which))
    else:
        raise CheckpointError(
            f"{which!r} names no checkpoint: give last, best, or one of the steps {steps}"
        )
    if path is None or path not in found:
        raise CheckpointError(f"{folder} has no checkpoint {which!r}; it has the steps {steps}")
    return path
