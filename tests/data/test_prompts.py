"""A row of any known shape is a conversation that is open where the target answers, and those of
similar length share a batch."""

from __future__ import annotations

import pytest

from trainer.data import prompts
from trainer.data.prompts import PromptRow

READ = {"columns": {}, "format": "auto", "system": None}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "a"}, ["a", None]),
        ({"question": "a", "answer": "b"}, ["a", None]),
        (
            {
                "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}],
                "completion": "b",
            },
            ["s", "a", None],
        ),
        ({"instruction": "a", "input": "b", "output": "c"}, ["a\n\nb", None]),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            ["a", None],
        ),
        ({"turns": ["a", "b"]}, ["a", None, "b", None]),
    ],
)
def test_the_shapes_of_a_row(row, messages):
    (actual,) = prompts.rows_of_file(iter([("x:1", row)]), READ, None, False, 0, None)
    assert [message["content"] for message in actual.messages] == messages
    (renamed,) = prompts.rows_of_file(
        iter([("x:1", {"q": "a", "r": "b"})]),
        READ | {"columns": {"prompt": "q", "completion": "r"}},
        None,
        False,
        0,
        None,
    )
    assert [message["content"] for message in renamed.messages] == ["a", None]
    (named,) = prompts.rows_of_file(
        iter([("x:1", {"other": "q"})]), READ | {"system": "sys"}, "other", False, 0, None
    )
    assert [message["content"] for message in named.messages] == ["sys", "q", None]


def test_calls_of_tools_stay_as_they_are():
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }
    row = {
        "messages": [
            {"role": "user", "content": "a"},
            call,
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "b"},
        ],
        "tools": [{"name": "f"}],
    }
    (actual,) = prompts.rows_of_file(iter([("x:1", row)]), READ, None, True, 0, None)
    assert actual.messages[1] == call
    assert [message["content"] for message in actual.messages] == ["a", "", "1", None]
    assert actual.tools == [{"type": "function", "function": {"name": "f"}}]


def test_variables_of_the_template_travel_with_the_prompt():
    row = {"prompt": "a", "chat_template_kwargs": '{"enable_thinking": false}', "system": "s"}
    (actual,) = prompts.rows_of_file(iter([("x:1", row)]), READ, None, True, 0, None)
    assert actual.variables == {"enable_thinking": False}
    assert [message["content"] for message in actual.messages] == ["s", "a", None]


def test_every_row_that_is_missing_is_in_one_batch_among_rows_of_its_length():
    spans, size = 3, 2
    span = prompts.SPAN * size
    lengths = [(17 * row) % 101 for row in range(spans * span - 3)]
    actual = [
        PromptRow(row, "", [{"content": "a" * length}, {"content": None}])
        for row, length in enumerate(lengths)
    ]
    built = list(prompts.batches(actual, size, set()))
    assert sorted(ask.row for batch in built for ask in batch) == list(range(len(lengths)))
    assert {len(batch) for batch in built} == {size, 1}
    for number in range(spans):
        within = [lengths[ask.row] for batch in built for ask in batch if ask.row // span == number]
        assert within == sorted(within, reverse=True) != sorted(within)
    done = set(range(span)) | {actual[-1].row}
    again = list(prompts.batches(actual, size, done))
    assert again == [batch for batch in built if any(ask.row not in done for ask in batch)] != built
