"""Secrets: refuse a config that holds one, and redact them in all output."""

from __future__ import annotations

import functools
import logging
import os
import re
import traceback
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from trainer.config import schema
from trainer.config.shown import shown

_SECRET_VALUE = re.compile(
    # 40 hex digits are a W&B key; after a slash they are a commit in the hub's cache.
    r"(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|(?<![0-9a-f/])[0-9a-f]{40}(?![0-9a-f])"
    r"|wandb_v\d_\w{20,}|gh[pousr]_\w{30,}|github_pat_\w{20,}|glpat-[\w-]{20,}"
    # A web token begins with eyJ. The word around it is matched from its start, once: from each eyJ
    # on would take a time that grows with the square of the word.
    r"|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}"
    r"|(?<![\w-])(?=[\w-]*eyJ)[\w-]{13,}\.[\w-]{10,}\.[\w-]{10,}"
    r"|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?:[^-]+-----END [A-Z ]*PRIVATE KEY-----)?)"
)
_SECRET_KEY = re.compile(
    r"(^|_)((api|access|private|secret)_?key|token|secret|password|passwd|credentials?)$",
    re.IGNORECASE,
)


def secrets_in(config: DictConfig) -> Iterator[str]:
    """Yield a message for each value of a config that looks like a secret.

    Secrets belong in the environment: a config is logged, stored and sent to dashboards.
    """
    variables = list(_secret_variables())
    for path, value in schema.leaves(OmegaConf.to_container(config, resolve=False)):
        place = ".".join(path)
        if (
            not isinstance(value, str)
            or not value
            or re.match(r"hydra\.(overrides|runtime|job\.override_dirname)\b", place)
        ):
            continue  # Hydra repeats the other values here
        key_is_secret = any(_SECRET_KEY.search(key) for key in path) and path[:1] != ("hydra",)
        if key_is_secret or (
            _SECRET_VALUE.search(value) and path[-1] not in ("sha256", "revision")
        ):
            yield (
                f"{place} looks like a secret. Configs are logged: export it (WANDB_API_KEY,"
                " HF_TOKEN) instead."
            )
        for name in (name for name, secret in variables if secret in value):
            yield (
                f"{place} holds the value of the environment variable {name}, which is a secret by"
                " its name. Configs are logged: take it out."
            )


def _secret_variables() -> Iterator[tuple[str, str]]:
    """Yield (name, value) of environment variables whose name says that they are secret."""
    for name, value in os.environ.items():
        if _SECRET_KEY.search(name) and len(value) >= 8:
            yield name, value


def redact(text: str) -> str:
    """Replace what looks like a secret in a text, and every secret of the environment."""
    for _, value in _secret_variables():
        text = text.replace(value, "[redacted]")
    return _SECRET_VALUE.sub("[redacted]", text)


def redact_logs() -> None:
    """Pass every log record of this process through `redact` and `shown`, with its traceback."""
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return

    @functools.wraps(make)
    def redacting(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        try:
            message = record.getMessage()
        except Exception:  # its arguments do not fit; logging reports this itself
            return record
        if (redacted := shown(redact(message))) != message:
            record.msg, record.args = redacted, ()
        if record.exc_info and record.exc_info[1] is not None:
            trace = "".join(traceback.format_exception(record.exc_info[1])).rstrip()
            if (redacted := shown(redact(trace))) != trace:
                record.exc_text, record.exc_info = redacted, None
        return record

    redacting.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(redacting)
