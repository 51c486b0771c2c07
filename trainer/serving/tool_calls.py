"""Calls of tools in the text of an answer, in the two forms that most templates teach.

Hermes and Qwen write `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, one or several.
Llama 3 writes nothing but `{"name": ..., "parameters": {...}}`, several with `;` between them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_DECODER = json.JSONDecoder()


def calls(text: str, tools: Iterable[dict[str, Any]]) -> tuple[str, list[dict[str, str]]]:
    """Return the text without its calls, and the calls as {name, arguments}; arguments are JSON.
    A text of which one call cannot be read, or names none of `tools`, stays as it is."""
    names = {tool.get("function", tool).get("name") for tool in tools}
    before, *marked = text.split(OPEN)
    tagged = [part.partition(CLOSE) for part in marked]
    parts = [_read(inner) if close else None for inner, close, _ in tagged] or _bare(text)
    read = [_call(part) for part in parts]
    good = [call for call in read if call is not None and call["name"] in names]
    if not good or len(good) < len(read):
        return text, []
    content = before + "".join(rest for _, _, rest in tagged) if tagged else ""
    return content.strip(), good


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _bare(text: str) -> list[Any]:
    """Return the JSON objects that a text consists of, none if there is anything else in it."""
    rest, parts = text.strip().removeprefix("<|python_tag|>").strip(), []
    while rest:
        if not rest.startswith("{"):
            return []
        try:
            part, end = _DECODER.raw_decode(rest)
        except (ValueError, RecursionError):
            return []
        parts.append(part)
        rest = rest[end:].lstrip().removeprefix(";").lstrip()
    return parts


def _call(part: Any) -> dict[str, str] | None:
    """Return a call of its JSON, None if it is none."""
    if not isinstance(part, dict) or not isinstance(part.get("name"), str):
        return None
    arguments = part.get("arguments", part.get("parameters", {}))
    if isinstance(arguments, str):  # JSON in JSON
        arguments = _read(arguments)
    if not isinstance(arguments, dict):
        return None
    return {"name": part["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
