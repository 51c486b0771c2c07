"""Messages, calls and tools as data sets write them, brought to OpenAI's form."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tasks.conversation import convert
from tasks.messages import THOUGHTS, message, thought_of, tools
from tasks.reading import DataError
from tasks.task import Conversation

ASKED = {"role": "user", "content": "Where?"}
FUNCTION = {"name": "go", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}


def converted(row: dict[str, Any], format_: str = "messages", **more: Any) -> Conversation:
    return convert(row, format_, {}, None, "here", **more)


def answered(**more: Any) -> dict[str, Any]:
    return {"messages": [ASKED, {"role": "assistant", "content": "There."} | more]}


@pytest.mark.parametrize(
    "call",
    [
        {"type": "function", "function": {"name": "go", "arguments": '{"city": "Paris"}'}},
        {"function": {"name": "go", "arguments": '{"city": "Paris"}'}},
        {"name": "go", "arguments": '{"city": "Paris"}'},
        '{"name": "go", "arguments": "{\\"city\\": \\"Paris\\"}"}',
    ],
)
def test_a_call_has_one_form_however_it_is_written(call):
    (_, answer) = converted(answered(tool_calls=[call])).messages
    assert answer["tool_calls"][0]["function"] == {"name": "go", "arguments": '{"city": "Paris"}'}


def test_the_older_form_of_calls_and_their_results():
    call = {"name": "go", "arguments": '{"city": "Paris"}'}
    row = answered(content=None, function_call=call)
    row["messages"] += [
        {"role": "function", "name": "go", "content": "ok"},
        *answered()["messages"],
    ]
    actual = converted(row | {"functions": [FUNCTION]})
    assert actual.messages[1]["tool_calls"] == [{"type": "function", "function": call}]
    assert "function_call" not in actual.messages[1]
    assert actual.messages[2]["role"] == "tool"
    assert actual.tools == [TOOL]


def test_sharegpts_calls_and_tools_are_read_as_such():
    calls = [{"name": "go", "arguments": {"city": "Paris"}}, {"name": "go", "arguments": {}}]
    turns = [
        {"from": "human", "value": "Where?"},
        {"from": "function_call", "value": json.dumps(calls)},
        {"from": "observation", "value": "ok"},
        {"from": "gpt", "value": "There.", "weight": 0},
        {"role": "user", "content": "More?"},
        {"role": "assistant", "content": "No."},
    ]
    actual = converted({"conversations": turns, "tools": json.dumps([FUNCTION])}, "sharegpt")
    assert [call["function"] for call in actual.messages[1]["tool_calls"]] == calls
    assert actual.messages[1]["content"] == ""
    assert actual.tools == [TOOL]
    assert actual.untrained == {3}
    assert [one["role"] for one in actual.messages[4:]] == ["user", "assistant"]


def test_json_text_in_place_of_values_is_parsed():
    (requested, answer) = answered()["messages"]
    for messages in ([json.dumps(requested), json.dumps(answer)], json.dumps([requested, answer])):
        assert converted({"messages": messages}).messages == [requested, answer]


@pytest.mark.parametrize(
    "value", [[TOOL], TOOL, [FUNCTION], json.dumps([TOOL]), [json.dumps(FUNCTION)]]
)
def test_tools_have_one_form_however_they_are_written(value):
    assert tools(value) == [TOOL]


@pytest.mark.parametrize("value", [None, [], "", {}])
def test_no_tools_are_none(value):
    assert tools(value) is None


@pytest.mark.parametrize("name", THOUGHTS)
def test_reasoning_has_one_name(name):
    (_, answer) = converted(answered(**{name: "Because."})).messages
    assert answer["reasoning_content"] == "Because."
    assert answer.keys() == {"role", "content", "reasoning_content"}


def test_thoughts_in_content_parts_are_reasoning():
    parts = [{"type": "thinking", "thinking": "Because."}, {"type": "text", "text": "There."}]
    (_, answer) = converted(answered(content=parts)).messages
    assert (answer["content"], answer["reasoning_content"]) == ("There.", "Because.")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"content": "b"}, (None, "b")),
        ({"content": "<think>a</think>b"}, ("a", "b")),
        ({"content": "a</think>b"}, ("a", "b")),
        ({"content": "b", "reasoning_content": "a"}, ("a", "b")),
        ({"content": "b", "reasoning_content": ""}, ("", "b")),
    ],
)
def test_the_reasoning_of_an_answer(answer, expected):
    assert thought_of({"role": "assistant"} | answer) == expected


@pytest.mark.parametrize(
    ("flags", "untrained"),
    [
        ({}, set()),
        ({"weight": 1}, set()),
        ({"weight": 0}, {1}),
        ({"weight": 0.0}, {1}),
        ({"train": False}, {1}),
        ({"training": False}, {1}),
        ({"train": True, "weight": 1}, set()),
    ],
)
def test_flags_of_answers_say_which_are_trained(flags, untrained):
    row = answered(**flags)
    row["messages"] += answered()["messages"]
    actual = converted(row)
    assert actual.untrained == untrained
    assert actual.messages == [*answered()["messages"], *answered()["messages"]]


def test_an_answer_that_is_not_trained_may_be_empty():
    row = answered(content="", weight=0)
    row["messages"] += answered()["messages"]
    assert converted(row).untrained == {1}


def test_alpacas_system_and_history_come_first():
    row = {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]}
    actual = converted(row, "alpaca")
    assert [one["content"] for one in actual.messages] == ["s", "a", "b", "c", "d"]
    assert [one["role"] for one in actual.messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert converted(row | {"history": json.dumps([["a", "b"]])}, "alpaca") == actual
    assert actual.unread == ()


@pytest.mark.parametrize("format_", ["messages", "prompt_completion"])
def test_a_system_column_belongs_to_every_format(format_):
    row = answered() | {"prompt": "Where?", "completion": "There.", "system": "Be brief."}
    assert converted(row, format_).messages[0] == {"role": "system", "content": "Be brief."}


def test_columns_that_nothing_reads_are_named():
    row = answered() | {"id": 7, "empty": None, "weight": 2.0, "tools": [TOOL]}
    assert converted(row).unread == ("column 'id'", "column 'weight'")
    actual = converted(row, weight="weight")
    assert (actual.unread, actual.weight) == (("column 'id'",), 2.0)
    own = answered()
    own["messages"].insert(0, {"role": "system", "content": "s"})
    assert converted(own | {"system": "other"}).unread == ("column 'system'",)
    marks = {"row": 7, "cut": True, "inexact": True}  # of graft respond
    assert converted(own | marks).unread == ()
    assert converted(own | {"row": "a text", "cut": 3}).unread == ("column 'row'", "column 'cut'")


def test_variables_of_the_template_are_a_column():
    for value in ({"enable_thinking": False}, '{"enable_thinking": false}'):
        row = answered() | {"chat_template_kwargs": value}
        assert converted(row).variables == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (answered(tool_calls=[{"name": "go", "arguments": "{"}]), "call 1: arguments is text that"),
        (answered(tool_calls=[{"name": "go", "arguments": "[1]"}]), "arguments must be an object"),
        (answered(tool_calls=[{"arguments": {}}]), "call 1 must have a function with a name"),
        (answered(tool_calls=5), "tool_calls must be a list, and is int"),
        (
            answered(tool_calls=[FUNCTION], function_call=FUNCTION),
            "message 2 has both function_call and tool_calls",
        ),
        (answered(weight=0.5), "weight is 0.5, expected 0 or 1 (false or true)"),
        (answered(train="no"), "train is 'no', expected 0 or 1"),
        (answered(train=True, weight=0), "flags that disagree"),
        (answered(thinking="a", reasoning="b"), "several texts of reasoning (reasoning, thinking)"),
        (answered() | {"tools": "x"}, "tools is text that is no JSON"),
        (answered() | {"tools": [{"parameters": {}}]}, "tool 1 must describe a function with a"),
        (answered() | {"chat_template_kwargs": [1]}, "chat_template_kwargs must be an object"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(row, reason):
    with pytest.raises(DataError, match=re.escape(reason)):
        converted(row)


@pytest.mark.parametrize("value", [-1, "x", True, None, float("nan")])
def test_a_rows_weight_is_a_number(value):
    with pytest.raises(DataError, match="expected a number of at least 0: the row's weight"):
        converted(answered() | {"w": value}, weight="w")


def test_history_is_pairs_and_calls_are_json():
    with pytest.raises(DataError, match=re.escape("history, entry 1: expected [question, answer]")):
        converted({"instruction": "c", "output": "d", "history": ["a"]}, "alpaca")
    turns = [{"from": "human", "value": "a"}, {"from": "function_call", "value": "go"}]
    with pytest.raises(DataError, match="turn 2: function_call is text that is no JSON"):
        converted({"conversations": turns}, "sharegpt")


def test_a_message_alone_is_not_changed_by_its_reading():
    item = {"role": "assistant", "content": [{"type": "text", "text": "a"}], "name": None}
    assert message(item, 1) == {"role": "assistant", "content": "a"}
    assert item["content"] == [{"type": "text", "text": "a"}]
