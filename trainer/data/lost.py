"""The fields of a row that its rendered text lacks.

A text counts as written if it occurs as it is, stripped, or escaped as JSON, HTML or Python write
it. Messages must occur in their order, except for system texts, which templates move. Of tools,
names and descriptions of functions and parameters and the values of enums must occur; of types and
`required` templates write what their model knows.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tasks.messages import parsed, thought_of

# Keys that link messages or say what is plain from the rest; no text is lost with them.
LINKS = {"role", "content", "tool_calls", "reasoning_content", "tool_call_id", "train"}
_NAMED = ("name", "description")


def lost(
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    text: str,
    thinking: set[int],
    places: Mapping[int, tuple[int, int]] | None = None,
) -> Iterator[tuple[str, str]]:
    """Yield (which field of which message is missing in the text, the field's kind). The reasoning
    of the messages `thinking` must occur too; that of others may be cut, as it is at inference.

    `places` are the spans of answers that are known. Such an answer must occur in its span, and
    other messages before or after it as their order says. A word such as `user` may occur in a
    text that leaves the message out.
    """
    at = 0
    for index, message in enumerate(messages):
        start = 0 if message["role"] in ("system", "developer") else at
        first, stop = _window(index, places or {}, len(text))
        for field, kind, value, ways in _fields(message, index in thinking):
            end = _first(text, ways, max(start, first), stop)
            if end < 0:
                who = f"message {index + 1} ({message['role']})"
                yield f"{who}: {field} {_short(value)}", f"{kind} of role {message['role']}"
            elif message["role"] not in ("system", "developer"):
                at = max(at, end)
    for number, tool in enumerate(tools or [], 1):
        for field, value in _said(tool.get("function", tool), ""):
            if not all(_first(text, _ways(line), 0) >= 0 for line in value.splitlines()):
                yield f"tool {number}: {field} {value[:40]!r}", "tools"
                break


def _window(index: int, places: Mapping[int, tuple[int, int]], length: int) -> tuple[int, int]:
    """Return where in a text of `length` characters a message begins and ends at the outside."""
    if index in places:
        return places[index]
    before = [end for other, (_, end) in places.items() if other < index]
    after = [start for other, (start, _) in places.items() if other > index]
    return max(before, default=0), min(after, default=length)


def written(value: str, text: str) -> bool:
    """Return whether a text has a value in one of the ways in which it may be written."""
    return _first(text, _ways(value), 0) >= 0


def _fields(message: dict[str, Any], thinks: bool) -> Iterator[tuple[str, str, Any, Iterable[str]]]:
    """Yield (field, kind, value, the ways in which it may be written) of a message."""
    thought, content = (
        thought_of(message) if message["role"] == "assistant" else (None, message["content"])
    )
    if thinks and thought and thought.strip():
        yield "reasoning", "reasoning", thought, _ways(thought)
    if content.strip():
        yield "content", "content", content, _ways(content)
    for call in message.get("tool_calls") or []:
        function = call["function"]
        yield "tool_calls, name", "tool_calls", function["name"], [function["name"]]
        arguments = parsed(function["arguments"], "arguments")
        for path, value in _leaves(arguments, function["name"]):
            yield f"tool_calls, argument {path}", "tool_calls", value, _ways(value)


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values in arguments, with where each is."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"{path}.{key}", key
            yield from _leaves(item, f"{path}.{key}")
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, path)
    else:
        yield path, value


def _said(schema: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield (where, text) of the names, descriptions and enums of a JSON schema."""
    if not isinstance(schema, dict):
        return
    for key in _NAMED:
        if isinstance(text := schema.get(key), str):
            yield f"{path}{key}", text
    for value in schema.get("enum") or []:
        if isinstance(value, str):
            yield f"{path}enum", value
    properties = schema.get("properties")
    if isinstance(properties, dict):
        for name, inner in properties.items():
            yield f"{path}parameter", name
            yield from _said(inner, f"{path}{name}.")
    for key in ("parameters", "items"):
        yield from _said(schema.get(key), path)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 42 else f"{shown[:40]}..."


def _ways(value: Any) -> Iterator[str]:
    """Yield the texts that write a value, the likely ones first."""
    if not isinstance(value, str):
        yield json.dumps(value)
        yield str(value)
        return
    plain = value.strip()
    yield plain
    exact = json.dumps(plain, ensure_ascii=False)[1:-1]
    yield exact
    yield json.dumps(plain)[1:-1]
    yield html.escape(plain)
    yield repr(plain)[1:-1]
    yield json.dumps(exact, ensure_ascii=False)[1:-1]
    yield _as_html(exact)


def _as_html(text: str) -> str:
    # Jinja's own tojson escapes these.
    for character in "<>&'":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _first(text: str, ways: Iterable[str], start: int, stop: int | None = None) -> int:
    """Return the end of the first way that occurs in text[start:stop], -1 if none does."""
    for way in ways:
        if (position := text.find(way, start, stop)) >= 0:
            return position + len(way)
    return -1


def explained(fields: dict[str, str], plain: bool, may_lose: bool) -> str:
    """Return the reason for refusing a row of which the template leaves some `fields` out."""
    shown = "; ".join(list(fields)[:3])
    more = f" and {len(fields) - 3} more" if len(fields) > 3 else ""
    what = (
        "chat_template=none writes only contents, and leaves out"
        if plain
        else "the chat template leaves out"
    )
    ways = ["choose a template that writes it (task.chat_template)"]
    kinds = " ".join(fields.values())
    if "of role system" in kinds or "of role developer" in kinds:
        ways.append("write the system text into the first user message")
    elif "reasoning" in kinds:
        ways.append("write the reasoning into the content as the model should")
    if may_lose:
        ways.append("train without it: task.on_lost=warn")
    return f"{what} {shown}{more}. Fix: {', or '.join(ways)}"
