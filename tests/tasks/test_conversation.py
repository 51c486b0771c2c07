"""Chats as others write them, brought to one form, and what is said of those that cannot be."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tasks.conversation import convert, detect
from tasks.messages import ROLES
from tasks.reading import DataError
from tasks.task import Conversation

TWO = [{"role": "user", "content": "2+3="}, {"role": "assistant", "content": "5"}]
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}

ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": TWO},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "2+3="}, {"from": "gpt", "value": "5"}]
    },
    "alpaca": {"instruction": "2+3=", "input": "", "output": "5"},
    "prompt_completion": {"prompt": "2+3=", "completion": "5"},
}
OURS = {
    "messages": ["messages"],
    "sharegpt": ["conversations"],
    "alpaca": ["instruction", "input", "output"],
    "prompt_completion": ["prompt", "completion"],
}


def converted(
    row: dict[str, Any], format_: str, system: str | None = None, **columns: str
) -> Conversation:
    return convert(row, format_, columns, system, "rows.jsonl:7")


NESTED: list[Any] = ["x"]
for _ in range(2000):
    NESTED = [NESTED]


@pytest.mark.parametrize("format_", ROWS)
def test_every_format_gives_the_same_conversation(format_):
    assert detect(ROWS[format_], {}) == format_
    assert converted(ROWS[format_], format_) == Conversation(TWO, "rows.jsonl:7", None, "5")


@pytest.mark.parametrize("format_", ROWS)
def test_columns_may_have_other_names(format_):
    names = {ours: f"my {ours}" for ours in OURS[format_]}
    row = {names[ours]: value for ours, value in ROWS[format_].items()} | {"id": 1}
    assert detect(row, names) == format_
    assert converted(row, format_, **names).messages == TWO


@pytest.mark.parametrize("format_", ROWS)
def test_further_columns_do_not_matter(format_):
    row = ROWS[format_] | {"id": 3, "source": None, "text": "x"}
    assert detect(row, {}) == format_
    assert converted(row, format_).messages == TWO


@pytest.mark.parametrize("format_", ROWS)
def test_a_system_prompt_is_put_before_rows_without_one(format_):
    assert converted(ROWS[format_], format_, "Be brief.").messages == [
        {"role": "system", "content": "Be brief."},
        *TWO,
    ]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_rows_own_system_prompt_stays(role):
    own = {"role": role, "content": "Mine."}
    assert converted({"messages": [own, *TWO]}, "messages", "Be brief.").messages == [own, *TWO]


# messages


def test_content_in_parts_is_joined_and_empty_fields_are_left_out():
    messages = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "3="}],
            "name": None,
        },
        {"role": "assistant", "content": "5", "tool_calls": None, "reasoning": "easy"},
    ]
    expected = [TWO[0], {"role": "assistant", "content": "5", "reasoning_content": "easy"}]
    assert converted({"messages": messages}, "messages").messages == expected


def test_calls_and_tools_are_kept_and_a_call_needs_no_content():
    messages = [
        TWO[0],
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "5", "tool_call_id": "1"},
        TWO[1],
    ]
    actual = converted({"messages": messages, "tools": [TOOL]}, "messages")
    assert actual.messages == [messages[0], messages[1] | {"content": ""}, messages[2], messages[3]]
    assert (actual.tools, actual.reference) == ([TOOL], "5")


@pytest.mark.parametrize("tools", [None, []])
def test_no_tools_are_none(tools):
    assert converted({"messages": TWO, "tools": tools}, "messages").tools is None


def test_the_row_itself_is_not_changed():
    row = {"messages": [dict(message) for message in TWO]}
    converted(row, "messages", "Be brief.").messages[1]["content"] = "changed"
    assert row == {"messages": TWO}


# sharegpt


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("human", "user"),
        ("user", "user"),
        ("gpt", "assistant"),
        ("assistant", "assistant"),
        ("chatgpt", "assistant"),
        ("model", "assistant"),
        ("system", "system"),
        ("tool", "tool"),
        ("observation", "tool"),
        ("function_response", "tool"),
    ],
)
def test_the_names_of_sharegpts_speakers_are_roles(name, role):
    turns = [
        {"from": "human", "value": "a"},
        {"from": name, "value": "b"},
        {"from": "gpt", "value": "c"},
    ]
    assert [m["role"] for m in converted({"conversations": turns}, "sharegpt").messages] == [
        "user",
        role,
        "assistant",
    ]


@pytest.mark.parametrize(("system", "put"), [("Be brief.", True), ("", False), (None, False)])
def test_sharegpts_system_column_comes_first(system, put):
    actual = converted(ROWS["sharegpt"] | {"system": system}, "sharegpt").messages
    assert actual == [{"role": "system", "content": "Be brief."}] * put + TWO


# alpaca


@pytest.mark.parametrize(
    ("extra", "question"), [("2 3", "Add.\n\n2 3"), ("", "Add."), ("  ", "Add."), (None, "Add.")]
)
def test_alpacas_input_follows_the_instruction(extra, question):
    row = {"instruction": "Add.", "input": extra, "output": "5"}
    assert converted(row, "alpaca").messages == [{"role": "user", "content": question}, TWO[1]]
    if not extra:
        assert (
            converted({"instruction": "Add.", "output": "5"}, "alpaca").messages[0]["content"]
            == "Add."
        )


# prompt and completion


def test_either_side_may_be_messages():
    system = {"role": "system", "content": "S"}
    assert converted(
        {"prompt": [system, TWO[0]], "completion": "5"}, "prompt_completion"
    ).messages == [system, *TWO]
    assert (
        converted({"prompt": "2+3=", "completion": [TWO[1]]}, "prompt_completion").messages == TWO
    )


# what is wrong


def with_answer(content: Any) -> dict[str, Any]:
    return {"messages": [TWO[0], {"role": "assistant", "content": content}]}


def turns(*arguments: Any) -> dict[str, Any]:
    return {
        "conversations": [
            {"from": "human", "value": "a"},
            *arguments,
            {"from": "gpt", "value": "b"},
        ]
    }


@pytest.mark.parametrize(
    ("format_", "row", "message"),
    [
        (
            "messages",
            {"text": "a", "n": 1},
            "no column 'messages'; the row has: text, n; set task.columns={messages: YOUR_COLUMN}",
        ),
        ("sharegpt", {"text": "a"}, "no column 'conversations'; the row has: text"),
        (
            "alpaca",
            {"instruction": "a", "text": "b"},
            "no column 'output'; the row has: instruction, text",
        ),
        ("prompt_completion", {"prompt": "a"}, "no column 'completion'; the row has: prompt"),
        (
            "messages",
            {"messages": "text"},
            "messages must be a list with at least one entry, and is 'text'",
        ),
        (
            "messages",
            {"messages": []},
            "messages must be a list with at least one entry, and is '[]'",
        ),
        (
            "messages",
            {"messages": None},
            "messages must be a list with at least one entry, and is 'None'",
        ),
        (
            "messages",
            {"messages": ["Hi"]},
            "message 1 must be an object with role and content, and is 'Hi'",
        ),
        (
            "messages",
            {"messages": [{"content": "Hi"}]},
            "message 1 must be an object with role and content",
        ),
        (
            "messages",
            {"messages": [*TWO, {"role": "bot", "content": "x"}]},
            "message 3 has the role 'bot'; known: " + ", ".join(ROLES),
        ),
        (
            "messages",
            {"messages": [{"role": ["user"], "content": "x"}]},
            "message 1 has the role ['user']; known: ",
        ),
        ("messages", with_answer(5), "message 2: content must be text, and is int"),
        ("messages", with_answer(None), "message 2: content must be text, and is NoneType"),
        (
            "messages",
            with_answer([{"type": "image_url", "image_url": "x"}]),
            "message 2 has content parts that are not text",
        ),
        ("messages", with_answer([5]), "message 2 has content parts that are not text"),
        ("messages", with_answer(""), "message 2: the answer is empty"),
        ("messages", with_answer(" \n"), "message 2: the answer is empty"),
        (
            "messages",
            {"messages": [TWO[0], {"role": "assistant", "content": ""}, *TWO]},
            "message 2: the answer is empty",
        ),
        ("messages", {"messages": TWO[:1]}, "no assistant message: there is nothing to learn"),
        (
            "messages",
            {"messages": [*TWO, TWO[0]]},
            "the last message is of user: a row must end in an answer",
        ),
        (
            "messages",
            {"messages": TWO, "tools": "[1"},
            "tools is text that is no JSON (Expecting",
        ),
        ("messages", {"messages": '[{"role": "user", "role": "tool"}]'}, "the key 'role' twice"),
        ("messages", {"messages": '["\\ud800"]'}, "half of a surrogate pair"),
        ("messages", with_answer(NESTED), "its values are nested too deeply"),
        (
            "sharegpt",
            turns({"from": "gpt", "value": "x", "role": "user"}),
            "turn 2 has from and value, and another role too: 'user'. Leave one out",
        ),
        (
            "sharegpt",
            turns({"from": "gpt", "value": "x", "role": "assistant", "content": "y"}),
            "turn 2 has from and value, and another content too: 'y'. Leave one out",
        ),
        ("alpaca", {"instruction": "a", "input": 0, "output": "5"}, "input must be text, and is"),
        (
            "alpaca",
            {"instruction": "a", "output": "5", "history": 5},
            "history must be a list of [question, answer], and is '5'",
        ),
        ("sharegpt", turns("x"), "turn 2 must be an object with from and value, and is 'x'"),
        ("sharegpt", turns({"from": "gpt"}), "turn 2 must be an object with from and value"),
        (
            "sharegpt",
            turns({"from": "bot", "value": "x"}),
            "turn 2 is from 'bot'; known: human, user, gpt",
        ),
        (
            "sharegpt",
            turns({"from": ["gpt"], "value": "x"}),
            "turn 2 is from ['gpt']; known: human, user, gpt",
        ),
        (
            "sharegpt",
            turns({"from": "gpt", "value": None}),
            "turn 2: value must be text, and is NoneType",
        ),
        ("sharegpt", turns() | {"system": 5}, "system must be text, and is int: '5'"),
        ("alpaca", {"instruction": "", "output": "5"}, "instruction is empty"),
        ("alpaca", {"instruction": "a", "output": " "}, "output is empty"),
        ("alpaca", {"instruction": "a", "output": 5}, "output must be text, and is int: '5'"),
        (
            "alpaca",
            {"instruction": "a", "input": ["b"], "output": "5"},
            "input must be text, and is list",
        ),
        (
            "prompt_completion",
            {"prompt": None, "completion": "5"},
            "prompt must be text, and is NoneType",
        ),
        ("prompt_completion", {"prompt": "a", "completion": ""}, "completion is empty"),
        (
            "prompt_completion",
            {"prompt": [], "completion": "5"},
            "prompt must be a list with at least one entry",
        ),
        ("prompt_completion", {"prompt": "a", "completion": [TWO[0]]}, "no assistant message"),
    ],
)
def test_a_row_that_is_no_conversation_is_refused_with_the_reason(format_, row, message):
    with pytest.raises(DataError, match=re.escape(message)):
        converted(row, format_)


def test_a_column_that_was_named_is_missed_under_that_name():
    with pytest.raises(
        DataError, match=re.escape("no column 'q'; the row has: prompt, completion") + "$"
    ):
        converted(ROWS["prompt_completion"], "prompt_completion", prompt="q")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "a", "answer": "b"},
            "the columns (question, answer) are of no known format (messages: messages; ",
        ),
        ({}, "are of no known format"),
        ({"instruction": "a"}, "Map yours with task.columns={OURS: YOURS}"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "task.columns={completion: chosen}"),
        ({"chosen": [{}], "rejected": [{}]}, "task.columns={messages: chosen}"),
        ({"prompt;completion": "a;b"}, "separates columns with ';': write it with commas"),
        (
            ROWS["messages"] | ROWS["prompt_completion"],
            "fit several formats (messages, prompt_completion). Choose one with task.format",
        ),
    ],
)
def test_columns_that_do_not_tell_the_format_are_listed(row, message):
    with pytest.raises(DataError, match=re.escape(message)):
        detect(row, {})
