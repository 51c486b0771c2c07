"""Errors that a user can fix, as one message without a traceback. docs/troubleshooting.md lists
the exit codes."""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch

from adapters.delta import AdapterError
from tasks.reading import DataError
from tasks.wheel import FetchError
from trainer.config.errors import (
    EXIT_BAD_INPUT,
    PANIC,
    ConfigError,
    code_of,
    panicked,
    unwritable,
)
from trainer.config.secrets import redact
from trainer.config.shown import say
from trainer.data.chat_template import Refused
from trainer.data.loader import LoadingError, killed
from trainer.drafters import DrafterError
from trainer.exporting.upload import HubError, UploadError
from trainer.models.base import BaseError
from trainer.models.losses import NonFinite
from trainer.session import smaller
from trainer.storage.checkpoints import CheckpointError, UnusableCheckpoint
from trainer.storage.run_folder import FolderError
from trainer.training.out_of_memory import TooLarge, out_of_memory

log = logging.getLogger("trainer")

_BAD_INPUT = (
    ConfigError,
    BaseError,
    DataError,
    AdapterError,
    DrafterError,
    FetchError,
    FolderError,
    Refused,
    UnusableCheckpoint,
    UploadError,
)
_FAULTS = (CheckpointError, HubError, LoadingError, NonFinite)


def explained(
    error: BaseException, config: dict[str, Any], command: bool = False
) -> tuple[str, int] | None:
    """Return (message, exit code) of an error that has an explanation; None if it has none. A
    `command` is done again; a run is resumed."""
    if isinstance(error, _BAD_INPUT):
        return str(error), EXIT_BAD_INPUT
    if isinstance(error, _FAULTS):
        return str(error), 1
    if lost(error):
        first = str(error).strip().partition("\n")[0]
        return (
            (
                "lost contact with another process of this run: it died, or did not respond within"
                " lightning.timeout minutes. See its own message, and resume with resume=auto."
                f" The error here: {first[:300]}"
            ),
            1,
        )
    if (text := killed(error)) is not None:
        return text, 1
    if isinstance(error, TooLarge):
        # it was already run with one row at a time
        return f"{error}\n{smaller.advice(config | {'batch_size': 1})}", 1
    if out_of_memory(error):
        first = str(error).partition("\n")[0] or type(error).__name__
        return f"out of memory: {first}\n{smaller.advice(config)}", 1
    fix = "run the command again" if command else "resume with resume=auto"
    if (text := unwritable(error, fix)) is not None:
        return text, code_of(error) if command else 1
    return None


def lost(error: BaseException) -> bool:
    """Return whether an error says that the ranks of a run cannot reach each other any more."""
    text = str(error)
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError)
        and ("gloo" in text or "by peer" in text)
        and any(
            word in text
            for word in ("Connection", "Timed out", "timed out", "Broken pipe", "Socket")
        )
    )


def report_and_exit_code(error: Exception, config: dict[str, Any] | None = None) -> int:
    """Print an error's explanation and return the exit code, for the commands. An unexplained error
    is raised again."""
    explanation = explained(error, config or {}, command=True)
    if explanation is None:
        raise error
    say(redact(explanation[0]), file=sys.stderr)
    return explanation[1]


def log_and_exit_code(error: BaseException, config: dict[str, Any]) -> int:
    """Log an error's explanation and return the exit code, for a run. SystemExit and Ctrl-C
    are no errors: they are raised again."""
    if type(error).__name__ == PANIC:
        log.error("%s", panicked(error))
        return EXIT_BAD_INPUT
    if not isinstance(error, Exception):
        raise error
    explanation = explained(error, config)
    if explanation is None:
        log.exception(
            "an error that Graft has no explanation for; please report it with this traceback"
        )
        return 1
    log.error("%s", explanation[0])
    log.debug("", exc_info=error)
    return explanation[1]
