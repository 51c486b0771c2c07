"""The run folder: a run's settings, its versions, and its results.

run.yaml            config, overrides, versions, identity and end tokens, written before training
chat_template.jinja the template of the rows, others of its set in additional_chat_templates/
trainer.log         all log messages
preflight.json      the checks of data and settings before training
job                 the SLURM job of the last start, if there was one
metrics.jsonl/.csv  every logged step, every evaluation
samples.jsonl       generated answers before and after training
checkpoints/        from which the run resumes
adapter/            the result, as stock PEFT loads it
drafter/            the draft head, if one was trained (trainer.drafters.io)
start_head/         the head that drafter_adapter=lora trains further, as it was
report.html         all of it to look at
"""

from __future__ import annotations

import fcntl
import functools
import json
import logging
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config import compose, files, history, run_name, run_record, target_base
from trainer.config.errors import ConfigError
from trainer.config.run_record import rollbacks_of as rollbacks_of
from trainer.config.secrets import redact
from trainer.storage import door
from trainer.storage.atomic import write_text
from trainer.storage.door import FolderError as FolderError

log = logging.getLogger("trainer")

PACKAGES = (
    "torch",
    "lightning",
    "transformers",
    "peft",
    "datasets",
    "tokenizers",
    "bitsandbytes",
    "hydra-core",
    "wandb",
)
# The files that a start writes before run.yaml.
STARTED = {".lock", "trainer.log", "preflight.json", "job"}
# Settings that may differ when a run is resumed: they change neither what is trained nor in which
# order.
FREE = (
    "resume",
    "requeue",
    "max_requeues",
    "runs",
    "export",
    "name",
    "logger",
    "callbacks",
    "check_export",
    "report",
    "workers",
    "loading_timeout",
    "tokenise_processes",
    "objective.repeat_smaller",
    "lightning.profiler",
    "lightning.timeout",
    "threads",
    "fused",
    "cpu_attention",
    "cpu_elementwise",
    "compile",
    "base.attn_implementation",
    "max_time",
    "target.run",  # the identity records which step of which run it means
    "target.features",
)
# Settings that may differ as long as the learning rates of the steps that are done stay the same.
LENGTHS = ("max_steps", "max_epochs", "max_tokens")


_TIME = "%Y-%m-%dT%H:%M:%S%z"
TEMPLATE = "chat_template.jinja"  # transformers' names for the file, and for those next to it
MORE_TEMPLATES = "additional_chat_templates"
TRUSTED = "GRAFT_TRUST_REMOTE_CODE"  # allows the commands to run a model's own code


class RunFolder:
    """A run's folder, locked by one process at a time."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._lock: Any = None

    @classmethod
    def create(cls, path: Path, owner: bool = True) -> RunFolder:
        """Create and lock the folder. Only the `owner`, rank 0, does that; the other ranks never
        write there.

        Raises:
            FolderError: it cannot be written, or another process is running in it.
        """
        folder = cls(path)
        if not owner:
            return folder
        folder.refuse_links()
        try:
            folder.checkpoints.mkdir(parents=True, exist_ok=True)
            folder._lock = files.append(path / ".lock")
            fcntl.flock(folder._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (number := run_name.job()) is not None:
                write_text(path / "job", number)
        except BlockingIOError:
            folder._lock.close()
            raise FolderError(
                f"{path} is in use by another process. Wait for it, or choose another name="
            ) from None
        except OSError as error:
            raise FolderError(
                f"{path} cannot be written: {error.strerror}. Choose another folder with"
                " runs=FOLDER"
            ) from None
        return folder

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._lock is not None:
            self._lock.close()

    def refuse_links(self) -> None:
        """Refuse a folder with a symbolic link that leads out of it, or with a device or a FIFO.

        Raises:
            FolderError: names the entry.
        """
        door.enter(self.path)

    @property
    def file(self) -> Path:
        """The path of run.yaml."""
        return self.path / "run.yaml"

    def earlier(self) -> dict[str, Any] | None:
        """Return the content of run.yaml, None if there is no such file yet.

        Raises:
            FolderError: there is one and it cannot be read.
        """
        try:
            return run_record.read(self.file)
        except ValueError as error:
            raise FolderError(str(error)) from None

    def record(
        self,
        plain: dict[str, Any],
        overrides: list[str],
        identity: dict[str, Any],
        earlier: dict[str, Any] | None,
        parent: dict[str, Any] | None = None,
        answer_ends: dict[str, int] | None = None,
        machine: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Write run.yaml and return its content. A resumed run keeps its id, its list of starts and
        the parent that it branched off. `answer_ends` is from trainer.data.ends.record,
        `machine` the threads and kernels that a resumed run takes again."""
        start = {
            "time": time.strftime(_TIME),
            "command": redact(
                shlex.join([Path(sys.argv[0]).parent.name or sys.argv[0], *sys.argv[1:]])
            ),
            "host": platform.node(),
            "python": platform.python_version(),
            "versions": {name: _version(name) for name in PACKAGES},
            "git": _git_revision(),
        }
        content = {
            "id": earlier["id"] if earlier else os.urandom(4).hex(),
            "name": plain["name"],
            "parent": earlier.get("parent") if earlier else parent,
            "overrides": overrides,
            "identity": identity,
            "answer_ends": answer_ends or {},
            "finished": None,
            **(machine or {}),
            "starts": [*(earlier["starts"] if earlier else []), start],
            "config": plain,
        }
        if rollbacks := rollbacks_of(earlier or {"parent": parent}):
            content["rollbacks"] = rollbacks
        rewrite(self.file, content)
        return content

    def add_rollback(self, rollback: dict[str, Any]) -> None:
        """Record that the run has gone back: `at` which step it resumes, and how many it skips."""
        content: Any = self.earlier()
        rewrite(self.file, content | {"rollbacks": [*rollbacks_of(content), rollback]})

    def finish(self) -> None:
        """Record that the run is finished: its steps are done and its results are written."""
        content: Any = self.earlier()
        rewrite(self.file, content | {"finished": time.strftime(_TIME)})

    def is_finished(self, content: dict[str, Any]) -> bool:
        """Return whether the run of a run.yaml is finished. Older versions recorded it nowhere:
        their runs have a report then, if they were to write one."""
        if "finished" in content:
            return content["finished"] is not None
        return (self.path / "report.html").exists()


def rewrite(file: Path, content: dict[str, Any]) -> None:
    """Write a run.yaml."""
    write_text(file, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def write_template(folder: Path, template: str | dict[str, str] | None) -> None:
    """Write a chat template, or a tokenizer's set of several by name, as transformers does: that
    named default in chat_template.jinja, the others in additional_chat_templates/NAME.jinja."""
    named = {"default": template} if isinstance(template, str) else template or {}
    for name, text in named.items():
        if re.fullmatch(r"\w+", name):  # a stranger's tokenizer may have a path as a name
            file = folder / (TEMPLATE if name == "default" else f"{MORE_TEMPLATES}/{name}.jinja")
            file.parent.mkdir(exist_ok=True)
            write_text(file, text)


def use_template(folder: Path, task: Any) -> None:
    """Let a task render with the chat template that its run was trained with, whatever its file or
    the tokenizer has become since. Runs of older versions have none in their folder."""
    file = folder / TEMPLATE
    if (
        task.kind == "conversation"
        and getattr(task, "chat_template", None) != "none"
        and file.is_file()
    ):
        task.chat_template = str(file)


def remove_unused(path: Path) -> None:
    """Remove the folder of a start that failed before it was a run. It stays where it holds
    anything else, or where another process uses it."""
    try:
        if {entry.name for entry in path.iterdir()} - STARTED - {"checkpoints"}:
            return
        with (path / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (path / "checkpoints").exists():
                (path / "checkpoints").rmdir()
            for name in STARTED:
                (path / name).unlink(missing_ok=True)
            path.rmdir()
    except OSError:
        return


def differences(
    recorded: dict[str, Any], now: dict[str, Any], ignore: tuple[str, ...]
) -> list[str]:
    """Return a line of text for each setting that differs between two plain configs. `ignore`
    lists dotted keys that are not compared."""
    first, second = dict(flat(recorded)), dict(flat(now))
    return [
        f"{key}: {json.dumps(first.get(key))} in the run, {json.dumps(second.get(key))} now"
        for key in sorted(first.keys() | second.keys())
        if first.get(key) != second.get(key)
        and not any(key == free or key.startswith(free + ".") for free in ignore)
    ]


def flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of each leaf of a plain config."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def read(path: str) -> tuple[Path, dict[str, Any], str]:
    """Return (folder, content of run.yaml, which checkpoint) of `FOLDER[@last|best|STEP]`, the form
    in which commands name a run. FOLDER alone is its result: the checkpoint that `export` names.

    Raises:
        FolderError: it is no run folder, or its config does not fit this version.
    """
    folder_path, which = target_base.split(path)
    folder = RunFolder(folder_path)
    folder.refuse_links()
    content = folder.earlier()
    if content is None:
        raise FolderError(f"{folder_path} is no run folder: it has no run.yaml")
    complete(content, folder.file)
    # A folder may come from a stranger: its config is checked against conf/, as a new one would be.
    try:
        if (
            content["config"]["base"].get("trust_remote_code")
            and os.environ.get(TRUSTED, "").lower() != "true"
        ):
            raise FolderError(
                f"{folder.file}: base.trust_remote_code=true lets the model's repository run code,"
                " and a folder may come from anyone. If you trust"
                f" {content['config']['base'].get('path')}, export {TRUSTED}=true"
            )
        # resume=never, since the folder may have been moved
        settings = OmegaConf.create(content["config"] | {"resume": "never"})
        compose.check(settings, content["identity"]["choices"])
    except ConfigError as error:
        raise FolderError(f"{folder.file} does not fit this version of Graft:\n{error}") from None
    except (AttributeError, KeyError, TypeError, ValueError, OmegaConfBaseException) as error:
        raise FolderError(
            f"{folder.file} is not a run's record: {run_record.reason(error)}"
        ) from None
    return folder.path, content, which or content["config"]["export"]


def complete(content: dict[str, Any], file: Path, warn: bool = True) -> None:
    """Add to a run.yaml that an older version wrote, in place, the settings that are new since,
    with the defaults of conf/, and log a warning that names them if `warn`.

    Raises:
        FolderError: it is not a run's record.
    """
    try:
        keys = history.complete(content["config"], content["identity"]["choices"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FolderError(f"{file} is not a run's record: {run_record.reason(error)}") from None
    if keys and warn:
        _warn_completed(file, ", ".join(keys))


@functools.cache  # a program may read a folder several times
def _warn_completed(file: Path, keys: str) -> None:
    log.warning(
        "%s was written by an older version and lacks %s; using the defaults from conf/", file, keys
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    repository = Path(__file__).resolve().parent.parent.parent
    try:
        revision = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True, timeout=5
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain"],
            cwd=repository,
            capture_output=True,
            text=True,
            timeout=5,
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return f"{revision}{' with changes' if changed else ''}" if revision else None
