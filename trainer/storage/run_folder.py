"""The run folder: what a run was asked to do, with what, and what came of it.

run.yaml            config, overrides, versions, git revision, identity; written before anything is trained
trainer.log         what was said
preflight.json      what was found in the data before training
job                 the SLURM job that started it last, where one did
metrics.jsonl/.csv  every logged step, every evaluation
samples.jsonl       generated answers before and after
checkpoints/        to go on from
adapter/            the result, as stock PEFT loads it
drafter/            what drafts for it, where one was trained (trainer.drafters.io)
report.html         all of it to look at
"""

from __future__ import annotations

import fcntl
import functools
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config import compose, limits, run_name, target_base
from trainer.config import history as history_module
from trainer.config.errors import ConfigError
from trainer.config.secrets import redact
from trainer.storage.atomic import write_text

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
# What may differ when a run goes on: it changes neither what is trained nor in which order.
FREE = (
    "resume",
    "requeue",
    "max_requeues",
    "runs",
    "export",
    "name",
    "logger",
    "callbacks",
    "workers",
    "loading_timeout",
    "tokenise_processes",
    "lightning.profiler",
    "lightning.timeout",
    "threads",
    "fused",
    "compile",
    "base.attn_implementation",
    "max_time",
    "target.run",  # which step of which run it means is in the identity
    "target.features",
)
# free where the schedule's past stays what it was
LENGTHS = ("max_steps", "max_epochs", "max_tokens")


TRUSTED = "GRAFT_TRUST_REMOTE_CODE"  # how the verbs are told that a model's own code may run

_WRITTEN = {"id", "name", "overrides", "identity", "starts", "config"}


class FolderError(RuntimeError):
    """The run folder cannot be used. The message says why and how to mend it."""


class RunFolder:
    """A run's folder, held by one process at a time."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._lock: Any = None

    @classmethod
    def create(cls, path: Path, owner: bool = True) -> RunFolder:
        """The folder, made and locked. Without `owner` it is another process of the same run that
        writes there.

        Raises:
            FolderError: it cannot be written, or another process is running in it.
        """
        folder = cls(path)
        if not owner:
            return folder
        folder.refuse_links()
        try:
            folder.checkpoints.mkdir(parents=True, exist_ok=True)
            folder._lock = (path / ".lock").open("w")
            fcntl.flock(folder._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (number := run_name.job()) is not None:
                (path / "job").write_text(number)
        except BlockingIOError:
            folder._lock.close()
            raise FolderError(
                f"{path} is in use by another process. Wait for it, or choose another name="
            ) from None
        except OSError as error:
            raise FolderError(
                f"{path} cannot be written: {error.strerror}. Choose another place with runs=FOLDER"
            ) from None
        return folder

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._lock is not None:
            self._lock.close()

    def refuse_links(self) -> None:
        """Refuse a folder with a symbolic link that leads out of it: what is written here would be
        written there.

        Raises:
            FolderError: names the link.
        """
        # W&B links its logs to those in the user's cache; a run never writes below an earlier run's
        # folder there.
        if (link := limits.link_outside(self.path, "wandb")) is not None:
            raise FolderError(
                f"{link} is a link that leads out of the run folder. Put what it leads to in its"
                " place"
            )

    @property
    def file(self) -> Path:
        return self.path / "run.yaml"

    def earlier(self) -> dict[str, Any] | None:
        """run.yaml of an earlier start in this folder, if any.

        Raises:
            FolderError: there is one and it cannot be read.
        """
        if not self.file.exists():
            return None
        try:
            content = limits.load_yaml(self.file)
        except (OSError, UnicodeDecodeError, limits.LimitExceeded, yaml.YAMLError) as error:
            raise FolderError(f"{self.file} cannot be read: {error}") from None
        if not isinstance(content, dict) or not content.keys() >= _WRITTEN:
            raise FolderError(
                f"{self.file} is not what a run writes: it has to hold"
                f" {', '.join(sorted(_WRITTEN))}"
            )
        return content

    def record(
        self,
        plain: dict[str, Any],
        overrides: list[str],
        identity: dict[str, Any],
        earlier: dict[str, Any] | None,
        parent: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Write run.yaml and return it. A run that goes on keeps its id, its list of starts and the
        parent that it branched off."""
        start = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
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
            "starts": [*(earlier["starts"] if earlier else []), start],
            "config": plain,
        }
        write_text(self.file, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
        return content


def differences(then: dict[str, Any], now: dict[str, Any], ignore: tuple[str, ...]) -> list[str]:
    """Settings that are not the same in two plain configs, as lines for people; `ignore` lists
    dotted keys to pass over."""
    first, second = dict(_flat(then)), dict(_flat(now))
    return [
        f"{key}: {json.dumps(first.get(key))} in the run, {json.dumps(second.get(key))} now"
        for key in sorted(first.keys() | second.keys())
        if first.get(key) != second.get(key)
        and not any(key == free or key.startswith(free + ".") for free in ignore)
    ]


def _flat(node: Any, prefix: str = "") -> Any:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def read(path: str) -> tuple[Path, dict[str, Any], str]:
    """(folder, run.yaml, which checkpoint) of `FOLDER` or `FOLDER@last|best|STEP`, as the verbs
    take it.

    Raises:
        FolderError: it is no run folder, or its config holds what this version does not make.
    """
    place, which = target_base.split(path)
    folder = RunFolder(place)
    content = folder.earlier()
    if content is None:
        raise FolderError(f"{place} is no run folder: it has no run.yaml")
    folder.refuse_links()
    complete(content, folder.file)
    # A folder may come from a stranger: what it names is held against conf/ as a new config would
    # be.
    try:
        if (
            content["config"]["base"].get("trust_remote_code")
            and os.environ.get(TRUSTED, "").lower() != "true"
        ):
            raise FolderError(
                f"{folder.file}: base.trust_remote_code is on, so that the model's repository runs"
                " code, and a folder may come from anyone. If you trust"
                f" {content['config']['base'].get('path')}, export {TRUSTED}=true"
            )
        # a folder may have been moved since
        settings = OmegaConf.create(content["config"] | {"resume": "never"})
        compose.check(settings, content["identity"]["choices"])
    except ConfigError as error:
        raise FolderError(f"{folder.file} does not fit this version of Graft:\n{error}") from None
    except (AttributeError, KeyError, TypeError, ValueError, OmegaConfBaseException) as error:
        raise FolderError(
            f"{folder.file} is not what a run writes: {type(error).__name__}: {error}"
        ) from None
    return folder.path, content, which


def complete(content: dict[str, Any], file: Path) -> None:
    """Give the config of a run.yaml that an older version wrote, in place, what has come since,
    with the defaults of conf/, and say so.

    Raises:
        FolderError: it is not what a run writes.
    """
    try:
        places = history_module.complete(content["config"], content["identity"]["choices"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FolderError(
            f"{file} is not what a run writes: {type(error).__name__}: {error}"
        ) from None
    if places:
        _say_completed(file, ", ".join(places))


@functools.cache  # a program may read a folder several times
def _say_completed(file: Path, places: str) -> None:
    log.warning("%s is of an older version, and has no %s: taken as conf/ has it", file, places)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    here = Path(__file__).resolve().parent.parent.parent
    try:
        revision = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, timeout=5
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return f"{revision}{' with changes' if changed else ''}" if revision else None
