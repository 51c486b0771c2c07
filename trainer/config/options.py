"""Options of commands: NAME=VALUE words into values."""

from __future__ import annotations

from typing import Any

from trainer.config import schema
from trainer.config.errors import bad


def arguments(argv: list[str], known: dict[str, Any], usage: str) -> dict[str, Any]:
    """Parse the `key=value` arguments of a verb. `known` maps each key to its default; `...` marks
    a required one.

    Raises:
        SystemExit: 0 after `--help`; 2 on an unknown or missing key, with the usage.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(usage)
        raise SystemExit(0)
    given: dict[str, Any] = {}
    for word in argv:
        key, equals, value = word.partition("=")
        if not equals or key not in known:
            fault = schema.nearest(key, known) if equals else "Arguments are written key=value."
            raise SystemExit(bad(f"{word}: not an argument. {fault}\n\n{usage}"))
        try:
            given[key] = _typed(value, known[key])
        except ValueError:
            raise SystemExit(
                bad(f"{word}: {key} takes {type(known[key]).__name__}\n\n{usage}")
            ) from None
    missing = [key for key, default in known.items() if default is ... and key not in given]
    if missing:
        raise SystemExit(bad(f"missing: {', '.join(missing)}\n\n{usage}"))
    return {**known, **given}


def _typed(value: str, default: Any) -> Any:
    if value == "null" and default is None:
        return None
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise ValueError(value)
        return value.lower() == "true"
    return type(default)(value) if isinstance(default, int | float) else value
