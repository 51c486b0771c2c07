"""The formats of chats, converted to one: a list of messages as in OpenAI's API.

messages            {"messages": [{"role": "user", "content": "Hi"},
                                  {"role": "assistant", "content": "Hello"}], "tools": [...]}
sharegpt            {"conversations": [{"from": "human", "value": "Hi"},
                                       {"from": "gpt", "value": "Hello"}], "system": "..."}
                    {"conversations": [{"from": "function_call", "value": "{\"name\": ...}"}, ...]}
alpaca              {"instruction": "Add.", "input": "2 3", "output": "5", "system": "...",
                     "history": [["Hi", "Hello"]]}
prompt_completion   {"prompt": "2 + 3 =", "completion": "5"}
                    either side may be a list of messages too

Every format may have the columns `tools` (or OpenAI's older `functions`), `system` and
`chat_template_kwargs`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tasks.messages import message, parsed, tools
from tasks.reading import DataError
from tasks.task import Conversation, Read, column, text_of, weight_of

_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
    "function_response": "tool",
}
FORMATS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
}


def detect(row: dict[str, Any], columns: dict[str, str]) -> str:
    """Return the format whose columns a row has.

    Raises:
        DataError: no format fits, or several do.
    """
    fits = [
        name
        for name, needed in FORMATS.items()
        if all(columns.get(key, key) in row for key in needed)
    ]
    if len(fits) == 1:
        return fits[0]
    known = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in FORMATS.items())
    if not fits:
        raise DataError(
            f"the columns ({', '.join(map(str, row))}) are of no known format ({known})."
            f" {_way_out(row)}"
        )
    raise DataError(
        f"the columns fit several formats ({', '.join(fits)}). Choose one with task.format"
    )


def _way_out(row: dict[str, Any]) -> str:
    """Return how rows of no known format can be read."""
    if "chosen" in row and "rejected" in row:  # rows of preferences
        ours = "messages" if isinstance(row["chosen"], list) else "completion"
        return (
            "Graft learns no preferences; to train the chosen answers alone, set"
            f" task.columns={{{ours}: chosen}}"
        )
    only = str(next(iter(row))) if len(row) == 1 else ""
    if separator := next((mark for mark in ";\t|" if mark in only), None):
        return f"The file separates columns with {separator!r}: write it with commas"
    return "Map yours with task.columns={OURS: YOURS}"


def convert(
    row: dict[str, Any],
    format_: str,
    columns: dict[str, str],
    system: str | None,
    where: str,
    weight: str | None = None,
) -> Conversation:
    """Return one row as a Conversation that ends in an answer. `weight` is the column of its
    weight.

    Raises:
        DataError: a column is missing, a value has the wrong type, or an answer is empty.
    """
    row = Read(row)
    try:
        messages = _FORMATS[format_](row, columns)
    except RecursionError:
        raise DataError("its values are nested too deeply") from None
    first = row.get(columns.get("system", "system")) if _needs_system(messages) else None
    if first is not None and first != "":
        messages.insert(0, {"role": "system", "content": text_of(first, "system")})
    if system is not None and _needs_system(messages):
        messages.insert(0, {"role": "system", "content": system})
    _check(messages)
    untrained = frozenset(i for i, m in enumerate(messages) if m.pop("train", True) is False)
    return Conversation(
        messages,
        where,
        _tools(row, columns),
        messages[-1].get("content"),
        untrained,
        _variables(row.get(columns.get("chat_template_kwargs", "chat_template_kwargs"))),
        weight_of(row, columns, weight),
        tuple(f"column {name!r}" for name in row.unread()),
    )


def _needs_system(messages: list[dict[str, Any]]) -> bool:
    return bool(messages) and messages[0]["role"] not in ("system", "developer")


def _tools(row: Read, columns: dict[str, str]) -> list[dict[str, Any]] | None:
    value = row.get(columns.get("tools", "tools"))
    return tools(value or row.get("functions"))


def _variables(value: Any) -> dict[str, Any]:
    value = parsed(value, "chat_template_kwargs") if value else {}
    if not isinstance(value, dict):
        raise DataError(
            f"chat_template_kwargs must be an object, and is {type(value).__name__}:"
            f" {str(value)[:60]!r}"
        )
    return {name: item for name, item in value.items() if item is not None}


def _messages(row: Read, columns: dict[str, str]) -> list[dict[str, Any]]:
    items = _listed(column(row, columns, "messages"), "messages")
    return [message(item, number) for number, item in enumerate(items, 1)]


def _sharegpt(row: Read, columns: dict[str, str]) -> list[dict[str, Any]]:
    items = _listed(column(row, columns, "conversations"), "conversations")
    return [_turn(item, number) for number, item in enumerate(items, 1)]


def _alpaca(row: Read, columns: dict[str, str]) -> list[dict[str, Any]]:
    instruction = text_of(column(row, columns, "instruction"), "instruction")
    extra = row.get(columns.get("input", "input"))
    extra = "" if extra is None else extra
    if not isinstance(extra, str):
        raise DataError(f"input must be text, and is {type(extra).__name__}")
    question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    return [
        *_history(row.get(columns.get("history", "history"))),
        {"role": "user", "content": question},
        {"role": "assistant", "content": text_of(column(row, columns, "output"), "output")},
    ]


def _history(value: Any) -> list[dict[str, Any]]:
    """Return the earlier turns of an Alpaca row, a list of [question, answer]."""
    messages = []
    pairs = parsed(value, "history") if value else []
    if not isinstance(pairs, list):
        raise DataError(f"history must be a list of [question, answer], and is {str(value)[:60]!r}")
    for number, pair in enumerate(pairs, 1):
        if (
            not isinstance(pair, list | tuple)
            or len(pair) != 2
            or not all(isinstance(text, str) for text in pair)
        ):
            raise DataError(
                f"history, entry {number}: expected [question, answer], and is {str(pair)[:60]!r}"
            )
        messages += [
            {"role": "user", "content": pair[0]},
            {"role": "assistant", "content": pair[1]},
        ]
    return messages


def _prompt_completion(row: Read, columns: dict[str, str]) -> list[dict[str, Any]]:
    return _side(column(row, columns, "prompt"), "prompt", "user") + _side(
        column(row, columns, "completion"), "completion", "assistant"
    )


_FORMATS: dict[str, Callable[[Read, dict[str, str]], list[dict[str, Any]]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
}


def _listed(value: Any, name: str) -> list[Any]:
    value = parsed(value, name) if isinstance(value, str) and value[:1] in "[{" else value
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{name} must be a list with at least one entry, and is {str(value)[:60]!r}"
        )
    return value


def _turn(item: Any, number: int) -> dict[str, Any]:
    if isinstance(item, dict) and "role" in item and "from" not in item:
        return message(item, number)
    if not isinstance(item, dict) or "from" not in item or "value" not in item:
        raise DataError(
            f"turn {number} must be an object with from and value, and is {str(item)[:60]!r}"
        )
    if item["from"] not in list(_SHAREGPT):  # a list: JSON values may not be hashable
        raise DataError(f"turn {number} is from {item['from']!r}; known: {', '.join(_SHAREGPT)}")
    if not isinstance(item["value"], str):
        raise DataError(f"turn {number}: value must be text, and is {type(item['value']).__name__}")
    role, value = _SHAREGPT[item["from"]], item["value"]
    for key, same in (("role", (None, item["from"], role)), ("content", (None, value))):
        if item.get(key) not in same:
            raise DataError(
                f"turn {number} has from and value, and another {key} too:"
                f" {str(item[key])[:60]!r}. Leave one out"
            )
    more = {key: item[key] for key in item if key not in ("from", "value", "role", "content")}
    more["content"] = value
    if item["from"] == "function_call":
        calls = parsed(value, f"turn {number}: function_call")
        more |= {"content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
    return message({"role": role} | more, number)


def _side(value: Any, name: str, role: str) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return [message(item, number) for number, item in enumerate(_listed(value, name), 1)]
    return [{"role": role, "content": text_of(value, name)}]


def _check(messages: list[dict[str, Any]]) -> None:
    answers = [
        (number, answer)
        for number, answer in enumerate(messages, 1)
        if answer["role"] == "assistant"
    ]
    if not answers:
        raise DataError("no assistant message: there is nothing to learn")
    for number, answer in answers:
        has_text = answer["content"].strip() or answer.get("tool_calls")
        if not has_text and answer.get("train", True):
            raise DataError(f"message {number}: the answer is empty")
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"the last message is of {messages[-1]['role']}: a row must end in an answer"
        )
