"""Files and folders that a config or a command line names, checked before torch is imported."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config import run_record
from trainer.config.errors import ConfigError, cache_dir, full_disk, unusable_cache
from trainer.config.target_base import split

NO_BASE = (
    "there is no such folder. base.path is a folder, a .gguf file or a name on the hub, as ORG/NAME"
)


def check(config: dict[str, Any]) -> None:
    """Check that the files and folders of a plain config exist.

    Raises:
        ConfigError: names each that does not.
    """
    if missing := list(problems(config)):
        raise ConfigError("\n".join(missing))


def problems(config: dict[str, Any]) -> Iterator[str]:
    """Yield a message for each path of a plain config that does not exist. `target.run` is checked
    when the config is composed."""
    yield from _task_problems(config["task"])
    if (fault := cache_fault()) is not None:
        yield fault
    base = config["base"]
    path = base.get("path")
    if isinstance(path, str) and base.get("gguf_file") is None and (fault := base_fault(path)):
        yield fault
    teacher = (config.get("objective") or {}).get("teacher")
    if isinstance(teacher, str) and base_fault(teacher) is not None:
        yield f"objective.teacher={teacher}: {NO_BASE.replace('base.path is', 'Give')}"
    branch, draft = config.get("branch"), config["target"].get("draft")
    if branch and (fault := run_fault(branch["run"])):
        yield f"branch.run={branch['run']}: {fault}"
    if draft is not None and (fault := drafter_folder(draft)[1]):
        yield f"target.draft={draft}: {fault}"


def _task_problems(task: dict[str, Any]) -> Iterator[str]:
    parts = task.get("parts") or {}
    nodes = {"": task} | {f"task.parts.{name}: ": part for name, part in parts.items()}
    for where, node in nodes.items():
        for key in ("path", "eval_path"):
            path = node.get(key) if isinstance(node, dict) else None
            texts = path if isinstance(path, list) else [path]
            if not path or not all(isinstance(text, str) for text in texts):
                continue  # the task's own check names it
            yield from (where + fault for fault in rows_problems(path, f"task.{key}"))


def rows_problems(path: str | list[str], key: str) -> Iterator[str]:
    """Say what is wrong with files of rows. The message names `key`."""
    from tasks import reading

    try:
        reading.Source(path, "train", False, key)
    except reading.DataError as error:
        yield str(error)


def cache_fault() -> str | None:
    """Say why nothing can be written to the cache. A full disk is no fault yet: the cache may hold
    all that the run needs."""
    cache = cache_dir()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return None
    except OSError as error:
        return None if full_disk(error) else unusable_cache(cache, error)


def file_fault(path: str | Path) -> str | None:
    """Say what is wrong with a file to read."""
    file = Path(path).expanduser()
    return None if file.is_file() else f"there is no such file (the current folder is {Path.cwd()})"


def config_dir_fault(path: str | Path) -> str | None:
    """Say what is wrong with a folder of experiments."""
    there = Path(path).expanduser().is_dir()
    return None if there else f"there is no such folder (the current folder is {Path.cwd()})"


def task_folder_fault(path: str | Path) -> str | None:
    """Say what is wrong with a folder of lm-eval's tasks."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return f"there is no such folder (the current folder is {Path.cwd()})"
    if not any(folder.rglob("*.yaml")):
        return "there is no .yaml file in it or below it"
    return None


def looks_local(path: str) -> bool:
    """Return whether a path cannot be a name on the hub, ORG/NAME."""
    return path.count("/") > 1 or path.startswith((".", "/", "~"))


def base_fault(path: str) -> str | None:
    """Say what is wrong with base.path, as far as that is known without the hub."""
    place = Path(path).expanduser()
    if path.endswith(".gguf"):
        return None if place.is_file() else f"base.path={path!r}: there is no such file"
    if (place / "run.yaml").exists():
        return (
            f"base {path!r} is a run folder, and no model: adapter.from={path} continues its"
            " adapter, and graft export to=merged makes a model of it"
        )
    return f"base {path!r}: {NO_BASE}" if looks_local(path) and not place.is_dir() else None


def model_fault(path: str) -> str | None:
    """Say what is wrong with a model's folder or its name on the hub."""
    missing = looks_local(path) and not Path(path).expanduser().exists()
    return "there is no such folder" if missing else None


def run_fault(path: str | Path) -> str | None:
    """Say what is wrong with `FOLDER` or `FOLDER@last|best|STEP`, the form in which commands name a
    run."""
    folder, _ = split(str(path))
    try:
        if run_record.read(folder / "run.yaml") is not None:
            return None
    except ValueError as error:
        return str(error)
    runs = [file.parent.name for file in folder.parent.glob("*/run.yaml")]
    close = difflib.get_close_matches(folder.name, runs, n=1, cutoff=0.6)
    hint = f". Did you mean {folder.parent / close[0]}?" if close else ""
    return f"{folder} is no run folder: it has no run.yaml{hint}"


def folder_fault(path: str | Path) -> str | None:
    """Say what is wrong with a run's folder, for a command that reads no checkpoint."""
    folder = Path(path).expanduser()
    alone = split(str(path))[0]
    if not folder.exists() and (alone / "run.yaml").exists():
        return f"this command reads no checkpoint: give {alone}"
    return run_fault(path)


def saved_fault(path: str | Path) -> str | None:
    """Say what is wrong with a run, or that it has no checkpoint of this name."""
    folder, which = split(str(path))
    return run_fault(path) or run_record.no_checkpoint(folder / "checkpoints", which or "last")


def listed(text: str) -> list[str]:
    """Return the members of `[A,B]`, as a command line has them."""
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    return [part.strip().strip("\"'") for part in inner.split(",") if part.strip()]


def runs_fault(text: str) -> str | None:
    """Name the first entry of a list whose checkpoint cannot be read, and the reason."""
    return next((fault for run in listed(text) if (fault := saved_fault(run))), None)


def drafter_folder(path: str) -> tuple[Path, str | None]:
    """(a drafter's folder, what is wrong with it), where `path` is that folder or the one of the
    run that trained it."""
    root = Path(path).expanduser()
    run = (root / "run.yaml").exists()
    folder = root / "drafter" if run else root
    if (folder / "config.json").exists():
        return folder, None
    return folder, (
        "that run has no drafter, or has not ended yet"
        if run
        else "it is no drafter's folder: it has no config.json"
    )


def drafter_fault(path: str) -> str | None:
    """Say what is wrong with a drafter's folder, or that of the run that trained it."""
    return drafter_folder(path)[1]
