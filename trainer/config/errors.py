"""Errors of configs and command lines: their text and exit code."""

from __future__ import annotations

import difflib
import errno
import sys
from pathlib import Path

from omegaconf.errors import OmegaConfBaseException

from trainer.config.quoting import how_to_quote
from trainer.config.secrets import redact
from trainer.config.shown import say

PANIC = "PanicException"  # of the Rust code in tokenizers; it is no Exception
EXIT_BAD_INPUT = 2  # config or data; see docs/troubleshooting.md, exit codes


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
    if (group, name) == ("hydra/sweeper", "optuna"):
        return (
            "hydra/sweeper=optuna needs a package that is not installed: pip install"
            " hydra-optuna-sweeper"
        )
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"{group}={name}: there is no such choice.{hint} Known: {', '.join(choices)}"


def bad(message: str) -> int:
    """Print an error message about a command line or a config, and return the exit code."""
    say(redact(message), file=sys.stderr)
    return EXIT_BAD_INPUT


def panicked(error: BaseException) -> str:
    """The message for an error of tokenizers' Rust code."""
    return (
        "the tokenizer gave up on a text: its tokenizer.json has a pattern that takes too long, or"
        f" is damaged. Use another base, or leave the text out. The error: {error}"
    )


# of a write that a user can fix: the disk is full, a quota, no permission, a read-only disk, a link
_UNWRITABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EIO,
    errno.ELOOP,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
}


def full_disk(error: BaseException) -> bool:
    """Return whether an error says that a disk is full; safetensors and torch have errors of their
    own."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return (isinstance(error, OSError) and error.errno in full) or (
        "No space left on device" in str(error)
    )


def code_of(error: BaseException) -> int:
    """Return the exit code of a command that ends in an error of `unwritable`: 2 if the user chose
    a place that cannot be written, 1 if the disk is full or broken."""
    disk = (errno.EFBIG, errno.EIO)
    return 1 if full_disk(error) or getattr(error, "errno", None) in disk else EXIT_BAD_INPUT


def cache_dir() -> Path:
    """The folder for fetched and computed files."""
    from tasks import wheel

    return wheel.cache_dir()


def unusable_cache(cache: Path, error: OSError) -> str:
    """The message for a cache that cannot be read or written."""
    return (
        f"the cache {cache} cannot be used: {error.filename}: {error.strerror}. Choose another one"
        " with GRAFT_CACHE=FOLDER"
    )


def unwritable(error: BaseException, fix: str = "run the command again") -> str | None:
    """The message for an error of reading or writing files that a user can fix; None for another
    error. `fix` is what to do afterwards."""
    if full_disk(error):
        place = getattr(error, "filename", None) or error
        return f"the disk is full: {place}. Free some space, and {fix}"
    if not isinstance(error, OSError) or not error.filename:
        return None
    place = str(error.filename)
    cache = cache_dir()
    if Path(place).is_relative_to(cache) or cache.is_relative_to(place):
        return unusable_cache(cache, error)
    if error.errno not in _UNWRITABLE:
        return None
    return (
        f"{place} cannot be read or written: {error.strerror}. Choose another place, or fix that"
        f" and {fix}"
    )
