"""Errors of configs and command lines: their text and exit code."""

from __future__ import annotations

import difflib
import sys

from omegaconf.errors import OmegaConfBaseException

from trainer.config.quoting import how_to_quote
from trainer.config.secrets import redact

EXIT_BAD_INPUT = 2  # config or data; see docs/config.md, exit codes


class ConfigError(ValueError):
    """The config cannot be run. The message lists every fault with its key and its fix."""


def explain(error: Exception) -> str:
    """Return a message for an error of composing a config or creating the run folder."""
    if (choices := getattr(error, "options", None)) and getattr(error, "missing_cfg_file", None):
        group, _, name = error.missing_cfg_file.rpartition("/")  # type: ignore[attr-defined]
        return no_such_choice(group, name, choices)
    if isinstance(error, OSError) and error.strerror:
        return (
            f"{error.filename} cannot be written: {error.strerror}. Choose another folder with"
            " runs=FOLDER"
        )
    text = str(error).partition("\nConfig search path:")[0]
    override = getattr(error, "override", None)  # of Hydra's OverrideParseException
    if override is not None:
        text = text.partition("\nSee https://hydra.cc")[0]
        if override not in text:
            text = f"{override.lstrip('+')}: {text}"
        if "=" in override:
            text = f"{text}\n{how_to_quote(override)}"
    if isinstance(error.__cause__, OmegaConfBaseException):
        text = f"{text}\n{error.__cause__}"
    return text


def no_such_choice(group: str, name: str, choices: list[str]) -> str:
    """Return the message for a choice that a group does not have."""
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"{group}={name}: there is no such choice.{hint} Known: {', '.join(choices)}"


def bad(message: str) -> int:
    """Print an error message about a command line or a config, and return the exit code."""
    print(redact(message), file=sys.stderr)
    return EXIT_BAD_INPUT
