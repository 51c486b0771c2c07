"""One message, one tool call and the tools of a row, in the form of OpenAI's API.

Forms that data sets write instead, and the result:

    a message, tool_calls, arguments or tools as JSON text    the value
    role function; function_call                              role tool; tool_calls
    {"name": ..., "arguments": ...} without `function`        a function call
    {"name": ..., "parameters": ...} without `function`       a function's description
    reasoning, thinking                                       reasoning_content
    content parts: text, thinking                             content, reasoning_content
    weight: 0, train: false                                   train: false, on answers only
"""

from __future__ import annotations

from typing import Any

from tasks.reading import DataError
from tasks.strict_json import strict_json

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # names of a message's reasoning
_TRAINED = ("weight", "train", "training")


def parsed(value: Any, name: str) -> Any:
    """Return the value that a JSON text holds; other values as they are.

    Raises:
        DataError: it is a text, and no JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return strict_json(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is text that is no JSON ({error}): {value[:60]!r}") from None


def message(item: Any, number: int) -> dict[str, Any]:
    """Return a message with `role` and a text as `content`, and without keys that are null.

    Raises:
        DataError: it is no message, its role is not known, or a value has the wrong type.
    """
    what = f"message {number}"
    if isinstance(item, str) and item.lstrip().startswith("{"):
        item = parsed(item, what)
    if not isinstance(item, dict) or "role" not in item:
        raise DataError(
            f"{what} must be an object with role and content, and is {str(item)[:60]!r}"
        )
    if item["role"] not in list(ROLES):  # a list: JSON values may not be hashable
        raise DataError(f"{what} has the role {item['role']!r}; known: {', '.join(ROLES)}")
    result = {key: value for key, value in item.items() if value is not None}
    if result["role"] == "function":
        result["role"] = "tool"
    _calls(result, what)
    _thoughts(result, what)
    content = result.get("content")
    if content is None and result.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise DataError(f"{what}: content must be text, and is {type(content).__name__}")
    result["content"] = content
    if result["role"] == "assistant":
        _flags(result, what)
    return result


def _calls(result: dict[str, Any], what: str) -> None:
    if (call := result.pop("function_call", None)) is not None:
        if result.get("tool_calls"):
            raise DataError(f"{what} has both function_call and tool_calls: leave one out")
        result["tool_calls"] = [parsed(call, f"{what}: function_call")]
    if "tool_calls" not in result:
        return
    listed = parsed(result["tool_calls"], f"{what}: tool_calls")
    if not isinstance(listed, list):
        raise DataError(f"{what}: tool_calls must be a list, and is {type(listed).__name__}")
    result["tool_calls"] = [
        tool_call(call, f"{what}: call {number}") for number, call in enumerate(listed, 1)
    ]
    if not listed:
        del result["tool_calls"]


def tool_call(call: Any, what: str) -> dict[str, Any]:
    """Return a call as {"type": "function", "function": {"name", "arguments"}}. Arguments that are
    JSON text stay text: the chat template decides which form it takes.

    Raises:
        DataError: it has no name, or its arguments are no object.
    """
    call = parsed(call, what)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{what} must have a function with a name, and is {str(call)[:60]!r}")
    arguments = function.get("arguments")
    if arguments is None or arguments == "":
        arguments = {}
    if not isinstance(parsed(arguments, f"{what}: arguments"), dict):
        raise DataError(
            f"{what}: arguments must be an object, or one as JSON text, and are"
            f" {str(arguments)[:60]!r}"
        )
    inner = {key: value for key, value in function.items() if value is not None}
    if function is call:
        rest = {key: inner.pop(key) for key in ("id", "type", "index") if key in inner}
        return {"type": "function"} | rest | {"function": inner | {"arguments": arguments}}
    outer = {key: value for key, value in call.items() if value is not None}
    return outer | {"function": inner | {"arguments": arguments}}


def _thoughts(result: dict[str, Any], what: str) -> None:
    """Turn content parts into content and reasoning, and give the reasoning its first name."""
    names = [name for name in THOUGHTS if name in result]
    thoughts = [_text(result.pop(name), f"{what}: {name}") for name in names]
    if isinstance(result.get("content"), list):
        texts = []
        for part in result["content"]:
            if isinstance(part, dict) and part.get("type") in ("thinking", "reasoning"):
                kind = part["type"]
                thoughts.append(_text(part.get(kind) or part.get("text"), what))
            else:
                texts.append(_text(part, what))
        result["content"] = "".join(texts)
    if len(set(thoughts)) > 1:
        raise DataError(f"{what} has several texts of reasoning ({', '.join(names)}): leave one")
    if thoughts:
        result["reasoning_content"] = thoughts[0]


def _text(value: Any, what: str) -> str:
    """Return a text, or the joined texts of content parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        return value["text"]
    if isinstance(value, list):
        return "".join(_text(part, what) for part in value)
    kind = value.get("type") if isinstance(value, dict) else None
    shown = f"a part of type {kind!r}" if kind else type(value).__name__
    raise DataError(f"{what} has content parts that are not text, but {shown}")


def _flags(result: dict[str, Any], what: str) -> None:
    """Leave `train: False` on an answer that its row does not want to train, and no other flag."""
    flags = set()
    for name in _TRAINED:
        if name not in result:
            continue
        value = result.pop(name)
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise DataError(
                f"{what}: {name} is {value!r}, expected 0 or 1 (false or true). A weight for the"
                " whole row is a column: task.weight_column"
            )
        flags.add(bool(value))
    if len(flags) > 1:
        raise DataError(f"{what} has flags that disagree ({', '.join(_TRAINED)})")
    if False in flags:
        result["train"] = False


def tools(value: Any) -> list[dict[str, Any]] | None:
    """Return a row's tools as a list of {"type": "function", "function": {...}}, None for none.

    Raises:
        DataError: they are no descriptions of functions.
    """
    value = parsed(value, "tools") if value else None
    if not value:
        return None
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise DataError(
            f"tools must be a list of function descriptions, and is {type(value).__name__}"
        )
    return [_tool(item, number) for number, item in enumerate(value, 1)]


def _tool(item: Any, number: int) -> dict[str, Any]:
    item = parsed(item, f"tool {number}")
    function = item.get("function", item) if isinstance(item, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(
            f"tool {number} must describe a function with a name, and is {str(item)[:60]!r}"
        )
    return item if function is not item else {"type": "function", "function": item}


def thought_of(message: dict[str, Any]) -> tuple[str | None, str]:
    """Return (reasoning, the rest of the content) of an answer. The reasoning is None if it has
    none, and stands between <think> and </think> if it is part of the content."""
    content = message["content"]
    if (thought := message.get("reasoning_content")) is not None:
        return thought, content
    before, closing, rest = content.rpartition("</think>")
    if not closing:
        return None, content
    return before.rpartition("<think>")[2] if "<think>" in before else before, rest
