"""JSON that means the same to every reader: rows, and the values of rows that are JSON text."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any


def strict_json(text: str) -> Any:
    """Return the value of a JSON text that means the same to every reader.

    Raises:
        ValueError: it is no JSON, or it has NaN, a key twice in one object, or half of a surrogate
            pair.
        RecursionError: it is nested too deeply.
    """
    value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_once)
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("it has half of a surrogate pair, which is no character") from None
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError(f"it has the key {repeated(key for key, _ in pairs)!r} twice: leave one")
    return result


def repeated(names: Iterable[str]) -> str:
    """Return the first name that comes a second time."""
    names = list(names)
    return next(name for place, name in enumerate(names) if name in names[:place])
