"""Checkpoints: whole or absent, and only ever read if they are as they were written.

`step-00000040.ckpt` holds trainable tensors, optimiser, counters and callbacks. Its manifest
`step-00000040.json` is written last: it holds the size and the digest, and its presence means that
the checkpoint is complete. Lightning would write through $TMPDIR, which on clusters is another
filesystem, where a full disk costs the last good file; here both files are written in their own
folder (trainer.storage.atomic).
"""

from __future__ import annotations

import errno
import json
import logging
import pickle
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tasks.wheel import sha256
from trainer.config import run_record
from trainer.storage import atomic, door

log = logging.getLogger(__name__)

MARKS = ("best", "constant")  # NAME.json marks a checkpoint
_MANIFEST = {"bytes": int, "sha256": str}


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read. The message says which, why, and what is left."""


class UnusableCheckpoint(CheckpointError):
    """The checkpoint that the user asks for is missing, damaged, or another run's."""


class NoSuchCheckpoint(UnusableCheckpoint):
    """The run has no checkpoint of the name that the user gave."""


@dataclass(frozen=True, order=True)
class Checkpoint:
    """The checkpoint after `step` optimiser steps, and where its file is."""

    step: int
    path: Path

    @classmethod
    def at(cls, folder: Path, step: int) -> Checkpoint:
        """Return the checkpoint of a step, whether or not it exists."""
        return cls(step, folder / f"step-{step:08d}.ckpt")

    @classmethod
    def of(cls, path: Path) -> Checkpoint:
        """Return the checkpoint whose file is `path`."""
        return cls(int(path.stem.removeprefix("step-")), path)

    @property
    def manifest(self) -> Path:
        """The JSON file with the checkpoint's step, size in bytes, digest and time."""
        return self.path.with_suffix(".json")

    @property
    def sha256(self) -> str | None:
        """The digest that the manifest records, None if there is none that can be read."""
        try:
            return door.json_file(self.manifest, _MANIFEST)["sha256"]
        except (OSError, ValueError):
            return None


def save(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint, and then its manifest.

    Raises:
        CheckpointError: a tensor holds NaN or infinite values, or the files cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _refuse_nonfinite(content, path)
    try:
        with atomic.file(path) as temporary:
            with temporary.open("wb") as stream:
                torch.save(content, stream)
            manifest = {
                "step": content["counters"]["step"],
                "bytes": temporary.stat().st_size,
                "sha256": sha256(temporary),
            }
        text = json.dumps(manifest | {"written": time.time()})
        atomic.write_text(path.with_suffix(".json"), text)
    except (OSError, RuntimeError) as error:
        # torch reports a lost data loading process wherever the program happens to be
        if str(error).startswith("DataLoader worker"):
            raise
        raise CheckpointError(_cannot_write(path, error)) from error


def _refuse_nonfinite(content: dict[str, Any], path: Path) -> None:
    for name, tensor in (content["adapter"]["tensors"] | content.get("drafter", {})).items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{name} holds NaN or infinite values, so {path.name} was not written. Earlier"
                " checkpoints are untouched"
            )


def _cannot_write(path: Path, error: Exception) -> str:
    free = shutil.disk_usage(path.parent).free
    # torch reports the place in its file, and the system's error only as the context
    caused_by = _system_error(error)
    number = caused_by.errno if caused_by is not None else None
    if number == errno.EFBIG:
        reason = "a limit on the size of files is reached (ulimit -f). Raise it"
    elif number == errno.EDQUOT:
        reason = "your quota on this disk is used up. Free some space"
    elif number == errno.ENOSPC or free < 1 << 20 or "unexpected pos" in str(error):
        reason = f"the disk is full ({free / 1e6:.1f} MB free). Free some space"
    elif caused_by is not None:
        reason = f"{caused_by.strerror or caused_by}. Fix that"
    else:
        reason = f"{error}. Fix that"
    earlier = complete(path.parent)
    left = (
        f"{earlier[-1].path.name} before it is untouched" if earlier else "there was none before it"
    )
    return f"{path} could not be written: {reason}, and resume with resume=auto; {left}"


def _system_error(error: BaseException | None) -> OSError | None:
    """Return the first error of the operating system among an error and what it came from."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def complete(folder: Path) -> list[Checkpoint]:
    """Return the checkpoints that have a manifest, oldest first. Files of an
    interrupted save are not among them."""
    return [Checkpoint.at(folder, step) for step in run_record.saved_steps(folder)]


def fault(checkpoint: Checkpoint) -> str | None:
    """Return what is wrong with a checkpoint's files, None if they are as they were written."""
    path = checkpoint.path
    try:
        manifest = door.json_file(checkpoint.manifest, _MANIFEST)
        if not path.is_file():
            return f"{path.name} is missing" if not path.exists() else "it is no regular file"
        if path.stat().st_size != manifest["bytes"]:
            return f"it has {path.stat().st_size} bytes instead of {manifest['bytes']}"
        if sha256(path) != manifest["sha256"]:
            return "its content has changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError):
        return "its manifest cannot be read"
    return None


def newest(folder: Path) -> Checkpoint | None:
    """Return the newest undamaged checkpoint, None if the folder has none at all. Damaged ones are
    skipped with a warning.

    Raises:
        UnusableCheckpoint: there are checkpoints, and all are damaged. Starting from scratch would
            then be a guess.
    """
    saved = complete(folder)
    faults = []
    for checkpoint in reversed(saved):
        reason = fault(checkpoint)
        if reason is None:
            return checkpoint
        log.warning("%s is damaged (%s) and was skipped", checkpoint.path.name, reason)
        faults.append(f"{checkpoint.path}: {reason}")
    if saved:
        raise UnusableCheckpoint(
            "every checkpoint of this run is damaged:\n"
            + "\n".join(faults)
            + "\nRestore one, or start from scratch with another name="
        )
    return None


def load(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return a checkpoint's content, on the CPU. Only tensors and plain data are read, so that no
    pickled code runs.

    Raises:
        UnusableCheckpoint: it is damaged or missing.
    """
    reason = fault(checkpoint)
    if reason is not None:
        raise UnusableCheckpoint(f"{checkpoint.path} cannot be used: {reason}")
    try:
        return torch.load(checkpoint.path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        # torch's own message advises to load it all the same
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f": it names {named[1]}, which could run code" if named else ""
        raise UnusableCheckpoint(
            f"{checkpoint.path} cannot be used: it is no checkpoint of tensors and plain data{what}"
        ) from None


def remove(checkpoint: Checkpoint) -> None:
    """Remove a checkpoint. The manifest goes first, so that an interrupted removal leaves an
    incomplete checkpoint and not a damaged one."""
    checkpoint.manifest.unlink(missing_ok=True)
    checkpoint.path.unlink(missing_ok=True)


def remove_after(folder: Path, step: int) -> None:
    """Remove the checkpoints after a step, and a mark of the best one if it is among them."""
    for checkpoint in complete(folder):
        if checkpoint.step > step:
            remove(checkpoint)
    best = marked(folder, "best")
    if best is not None and not best.path.exists():
        (folder / "best.json").unlink()


def remove_leftovers(folder: Path) -> None:
    """Remove what interrupted saves and removals left behind."""
    keep = {checkpoint.path for checkpoint in complete(folder)}
    files = (path for path in folder.glob("step-*.ckpt") if path not in keep)
    for path in [*folder.glob("*.tmp"), *files]:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)


def set_damaged_aside(folder: Path) -> None:
    """Rename marks of the best and of the constant checkpoint that cannot be read. A run calls this
    before it resumes."""
    for name in MARKS:
        try:
            marked(folder, name)
        except CheckpointError as error:
            door.set_aside(folder / f"{name}.json", str(error.__cause__))


def marked(folder: Path, name: str) -> Checkpoint | None:
    """Return the checkpoint that NAME.json marks as `best` or as the last of the `constant` phase,
    None if there is no such file.

    Raises:
        UnusableCheckpoint: the file is damaged.
    """
    file = folder / f"{name}.json"
    try:
        return Checkpoint.at(folder, door.json_file(file, {"step": int})["step"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UnusableCheckpoint(
            f"{file} is damaged ({door.reason(error)}), so it is not known which step is the {name}"
            " one: name a step instead, as in RUN@STEP"
        ) from error


def chosen(folder: Path, which: str) -> Checkpoint:
    """Return the checkpoint that `last`, `best` or the number of a step means.

    Raises:
        NoSuchCheckpoint: there is none. The message lists the steps that there are.
        UnusableCheckpoint: the checkpoints, or best.json, are damaged.
    """
    if (fault := run_record.no_checkpoint(folder, which)) is not None:
        raise NoSuchCheckpoint(fault)
    if which.isdecimal():
        return Checkpoint.at(folder, int(which))
    best = marked(folder, "best") if which == "best" else None
    checkpoint = best or newest(folder)
    saved = complete(folder)
    if checkpoint is None or checkpoint not in saved:
        steps = ", ".join(str(checkpoint.step) for checkpoint in saved) or "none"
        raise NoSuchCheckpoint(f"{folder} has no checkpoint {which!r}; it has the steps {steps}")
    return checkpoint
