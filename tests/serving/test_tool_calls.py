"""Calls of tools in answers, as OpenAI's client reads them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from trainer.serving import tool_calls
from trainer.serving.answers import Answer
from trainer.serving.events import End, Piece, Usage
from trainer.serving.requests import ChatSettings

TOOLS = [{"type": "function", "function": {"name": name}} for name in ("add", "find")]
ADD = {"name": "add", "arguments": '{"a": 1, "b": "ä"}'}
FIND = {"name": "find", "arguments": "{}"}
TAGGED = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "ä"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (TAGGED, "", [ADD]),
        (f'I add.\n{TAGGED}\n<tool_call>{{"name": "find"}}</tool_call>', "I add.", [ADD, FIND]),
        ('{"name": "add", "parameters": {"a": 1, "b": "ä"}}', "", [ADD]),
        ('<|python_tag|>{"name": "find", "parameters": {}}; {"name": "find"}', "", [FIND, FIND]),
        ('{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": \\"ä\\"}"}', "", [ADD]),
    ],
)
def test_both_forms_are_read(text, content, calls):
    assert tool_calls.calls(text, TOOLS) == (content, calls)


@pytest.mark.parametrize(
    "text",
    [
        "No call.",
        "",
        '<tool_call>{"name": "add", "arguments": {</tool_call>',
        '<tool_call>{"name": "drop", "arguments": {}}</tool_call>',
        '{"name": "add", "parameters": {}} and text',
        '{"name": "add", "parameters": 3}',
        '{"name": 3}',
        "[1]",
        f'{TAGGED}<tool_call>{{"name": "drop"}}</tool_call>',
        "{" * 100_000,
        "<tool_call>" * 50_000,
    ],
)
def test_what_is_no_call_stays_text(text):
    assert tool_calls.calls(text, TOOLS) == (text, [])


def answer(**settings):
    model = SimpleNamespace(name="mine", step=3)
    asked = {"model": "mine", "messages": [{"role": "user", "content": "?"}], "tools": TOOLS}
    return Answer(model, ChatSettings(**asked | settings))


def pieces(text):
    return [Piece(text[at : at + 7], [], Usage(1)) for at in range(0, len(text), 7)]


@pytest.mark.parametrize(("text", "content"), [(TAGGED, None), (f"I add. {TAGGED}", "I add.")])
def test_a_whole_answer_has_its_calls(text, content):
    whole = answer().whole([(pieces(text), End("stop", Usage(1)))])
    choice = ChatCompletion.model_validate(whole).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == content
    assert choice.message.tool_calls[0].function.model_dump() == ADD
    assert choice.message.tool_calls[0].id.startswith("call_")


@pytest.mark.parametrize("text", ["No call here.", TAGGED, f"I add. {TAGGED}"])
def test_a_stream_has_the_text_and_the_calls_of_the_whole_answer(text):
    streamed = answer(stream=True)
    chunks = [*streamed.first(), *map(streamed.piece, pieces(text)),
              *streamed.last(End("stop", Usage(1)))]  # fmt: skip
    read = [ChatCompletionChunk.model_validate(chunk).choices[0] for chunk in chunks]
    content = "".join(choice.delta.content or "" for choice in read)
    calls = [call for choice in read for call in choice.delta.tool_calls or ()]
    whole = answer().whole([(pieces(text), End("stop", Usage(1)))])["choices"][0]
    assert content == (whole["message"]["content"] or "")
    made = whole["message"].get("tool_calls", [])
    assert [call.function.model_dump() for call in calls] == [call["function"] for call in made]
    assert [call.index for call in calls] == [*range(len(made))]
    assert read[-1].finish_reason == whole["finish_reason"]


def test_without_tools_a_call_is_text():
    for settings in ({"tools": None}, {"tool_choice": "none"}):
        whole = answer(**settings).whole([(pieces(TAGGED), End("stop", Usage(1)))])
        choice = whole["choices"][0]
        assert choice["message"]["content"] == TAGGED
        assert choice["finish_reason"] == "stop"
        assert json.dumps(whole)
