"""The formats of chats, converted to one: a list of messages as in OpenAI's API.

messages            {"messages": [{"role": "user", "content": "Hi"},
                                  {"role": "assistant", "content": "Hello"}], "tools": [...]}
sharegpt            {"conversations": [{"from": "human", "value": "Hi"},
                                       {"from": "gpt", "value": "Hello"}], "system": "..."}
alpaca              {"instruction": "Add.", "input": "2 3", "output": "5"}
prompt_completion   {"prompt": "2 + 3 =", "completion": "5"}
                    either side may be a list of messages too
"""

from __future__ import annotations

from typing import Any

from tasks.reading import DataError
from tasks.task import Conversation, column, text_of

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
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
            f"the columns ({', '.join(map(str, row))}) are of no known format ({known}). Map yours"
            " with task.columns={OURS: YOURS}"
        )
    raise DataError(
        f"the columns fit several formats ({', '.join(fits)}). Choose one with task.format"
    )


def convert(
    row: dict[str, Any], format_: str, columns: dict[str, str], system: str | None, where: str
) -> Conversation:
    """Return one row as a Conversation that ends in an answer.

    Raises:
        DataError: a column is missing, a value has the wrong type, or an answer is empty.
    """
    tools = row.get(columns.get("tools", "tools")) or None
    if format_ == "messages":
        messages = [
            _message(item, number)
            for number, item in enumerate(_listed(column(row, columns, "messages"), "messages"), 1)
        ]
    elif format_ == "sharegpt":
        turns = _listed(column(row, columns, "conversations"), "conversations")
        messages = [_sharegpt(item, number) for number, item in enumerate(turns, 1)]
        if row.get(columns.get("system", "system")):
            messages.insert(
                0,
                {
                    "role": "system",
                    "content": text_of(row[columns.get("system", "system")], "system"),
                },
            )
    elif format_ == "alpaca":
        instruction = text_of(column(row, columns, "instruction"), "instruction")
        extra = row.get(columns.get("input", "input")) or ""
        if not isinstance(extra, str):
            raise DataError(f"input must be text, and is {type(extra).__name__}")
        question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": text_of(column(row, columns, "output"), "output")},
        ]
    else:
        messages = _side(column(row, columns, "prompt"), "prompt", "user") + _side(
            column(row, columns, "completion"), "completion", "assistant"
        )
    if system is not None and messages and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": system})
    _check(messages)
    if tools is not None and not isinstance(tools, list):
        raise DataError(
            f"tools must be a list of function descriptions, and is {type(tools).__name__}"
        )
    return Conversation(messages, where, tools, messages[-1].get("content"))


def _listed(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{name} must be a list with at least one entry, and is {str(value)[:60]!r}"
        )
    return value


def _message(item: Any, number: int) -> dict[str, Any]:
    if not isinstance(item, dict) or "role" not in item:
        raise DataError(
            f"message {number} must be an object with role and content, and is {str(item)[:60]!r}"
        )
    if item["role"] not in ROLES:
        raise DataError(
            f"message {number} has the role {item['role']!r}; known: {', '.join(ROLES)}"
        )
    content = item.get("content")
    if isinstance(content, list):  # OpenAI's content parts
        if not all(
            isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
        ):
            raise DataError(f"message {number} has content parts that are not text")
        content = "".join(part["text"] for part in content)
    if content is None and item.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise DataError(f"message {number}: content must be text, and is {type(content).__name__}")
    return {**{key: value for key, value in item.items() if value is not None}, "content": content}


def _sharegpt(item: Any, number: int) -> dict[str, Any]:
    if not isinstance(item, dict) or "from" not in item or "value" not in item:
        raise DataError(
            f"turn {number} must be an object with from and value, and is {str(item)[:60]!r}"
        )
    if item["from"] not in list(_SHAREGPT):  # a list: JSON values may not be hashable
        raise DataError(f"turn {number} is from {item['from']!r}; known: {', '.join(_SHAREGPT)}")
    if not isinstance(item["value"], str):
        raise DataError(f"turn {number}: value must be text, and is {type(item['value']).__name__}")
    return {"role": _SHAREGPT[item["from"]], "content": item["value"]}


def _side(value: Any, name: str, role: str) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return [_message(item, number) for number, item in enumerate(_listed(value, name), 1)]
    return [{"role": role, "content": text_of(value, name)}]


def _check(messages: list[dict[str, Any]]) -> None:
    answers = [
        (number, message)
        for number, message in enumerate(messages, 1)
        if message["role"] == "assistant"
    ]
    if not answers:
        raise DataError("no assistant message: there is nothing to learn")
    for number, message in answers:
        if not message["content"].strip() and not message.get("tool_calls"):
            raise DataError(f"message {number}: the answer is empty")
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"the last message is of {messages[-1]['role']}: a row must end in an answer"
        )
