"""run.yaml and the names of checkpoints, read from a run's folder before torch is imported."""

from __future__ import annotations

import re
from pathlib import Path
from types import NoneType
from typing import Any

import yaml

from trainer.config import limits
from trainer.config.shapes import mismatch

# of a run.yaml; what else a command needs, it checks itself
_ROLLBACKS = [{"at": int, "steps": int, "*": object}]
_RECORD: dict[str, Any] = {
    "id": str,
    "name": str,
    "overrides": [str],
    "identity": {"choices": dict, "steps?": (int, NoneType), "*": object},
    "starts": [dict],
    "config": dict,
    "parent?": (dict, NoneType),
    "rollbacks?": _ROLLBACKS,
    "finished?": (str, NoneType),
}


def read(file: Path) -> dict[str, Any] | None:
    """Return the content of a run.yaml, None if there is no such file.

    Raises:
        ValueError: it cannot be read, or is not a run's record. The message names the file.
    """
    if not file.exists():
        return None
    try:
        content = limits.load_yaml(file)
    except (OSError, UnicodeDecodeError, limits.LimitExceeded, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    if (fault := _fault(content)) is not None:
        raise ValueError(f"{file} is not a run's record: {fault}")
    return content  # type: ignore[no-any-return]


def reason(error: Exception) -> str:
    """Say why a run's record cannot be used, given the error of using it."""
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    return f"{type(error).__name__}: {error}"


def _fault(content: Any) -> str | None:
    fault = mismatch(content, _RECORD)
    if fault is None and not content["starts"]:
        fault = "starts is empty"
    if fault is None and content.get("parent") is not None:
        parent = {"run": str, "step": int, "rollbacks?": _ROLLBACKS}
        fault = mismatch(content["parent"], parent, "parent")
    if fault is None and any(min(back["at"], back["steps"]) < 0 for back in rollbacks_of(content)):
        fault = "a rollback has a negative number"
    return fault


def rollbacks_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rollbacks that a run.yaml records, a branch's those of its parent first."""
    if "rollbacks" in content:
        return list(content["rollbacks"])
    return list((content.get("parent") or {}).get("rollbacks", []))


def saved_steps(folder: Path) -> list[int]:
    """Return the steps of a folder of checkpoints that have a manifest, in rising order. Files of
    an interrupted save have none."""
    names = (re.fullmatch(r"step-(\d{8})\.json", path.name) for path in folder.glob("step-*.json"))
    return sorted(int(match.group(1)) for match in names if match)


def no_checkpoint(folder: Path, which: str) -> str | None:
    """Return a message if a folder of checkpoints has none that `last`, `best` or the number of a
    step could mean."""
    saved = saved_steps(folder)
    steps = ", ".join(map(str, saved)) or "none"
    if which not in ("last", "best") and not which.isdecimal():
        return f"{which!r} names no checkpoint: give last, best, or one of the steps {steps}"
    if saved and (not which.isdecimal() or int(which) in saved):
        return None
    why = "" if saved else ". The run has not saved one yet, or had callbacks.checkpoints=null"
    return f"{folder} has no checkpoint {which!r}; it has the steps {steps}{why}"
