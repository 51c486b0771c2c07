"""Errors of configs: what they say, and the exit code that they end with."""

from __future__ import annotations

import sys

from omegaconf.errors import OmegaConfBaseException

from trainer.config.secrets import redact

EXIT_BAD_INPUT = 2  # config or data; see README, exit codes


class ConfigError(ValueError):
    """The config cannot be run. The message lists every fault: what, where, how to mend it."""


def told(error: Exception) -> str:
    """What is wrong, without a traceback, when composing a config or making the run folder
    fails."""
    if isinstance(error, OSError) and error.strerror:
        return (
            f"{error.filename} cannot be written: {error.strerror}. Choose another place with"
            " runs=FOLDER"
        )
    text = str(error).partition("\nConfig search path:")[0]
    # of an OverrideParseException, which does not always name it
    override = getattr(error, "override", None)
    if override is not None and override not in text:
        text = f"{override}: {text}"
    return (
        f"{text}\n{error.__cause__}"
        if isinstance(error.__cause__, OmegaConfBaseException)
        else text
    )


def bad(message: str) -> int:
    """Say what is wrong with what was asked for; returns the exit code."""
    print(redact(message), file=sys.stderr)
    return EXIT_BAD_INPUT
