"""What a row says reaches the text, or is named. Each place of a row gets a word of its own, and a
template that leaves out just that place."""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace
from typing import Any

import pytest

from tasks.task import Conversation
from tests.toys.chat_templates import NAMES, SHAPES, TOOL, call, rendered, renderer, said
from trainer.data.chat_template import Refused
from trainer.data.lengths import Report, take
from trainer.data.lost import lost, written
from trainer.data.render import Renderer
from trainer.data.rendering import render_one

WHOLE = (
    "{{ tools | tojson }}{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.reasoning_content }};"
    "{{ m.content }};{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments"
    " | tojson }}){% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>"
    "assistant:{% endif %}"
)
ROW = Conversation(
    [
        said("system", "zsystem"),
        said("user", "zuser"),
        said("assistant", "zbefore", reasoning_content="zthought", tool_calls=[call("zcity", "1")]),
        said("tool", "zresult"),
        said("assistant", "zanswer"),
    ],
    "here",
    [TOOL],
)
# What a template forgets: the place, and what it does instead.
PLACES = {
    "message 1 (system): content 'zsystem'": (
        "{{ m.content }}",
        "{{ m.content if m.role != 'system' }}",
    ),
    "message 2 (user): content 'zuser'": ("{{ m.content }}", "{{ m.content if m.role != 'user' }}"),
    "message 3 (assistant): reasoning 'zthought'": ("{{ m.reasoning_content }}", ""),
    "message 3 (assistant): content 'zbefore'": (
        "{{ m.content }}",
        "{{ m.content if not m.tool_calls }}",
    ),
    "message 3 (assistant): tool_calls, name 'get_time'": ("{{ c.function.name }}", ""),
    "message 3 (assistant): tool_calls, argument get_time.city 'zcity'": (
        "{{ c.function.arguments | tojson }}",
        "{{ c.function.arguments.keys() | list }}",
    ),
    "message 4 (tool): content 'zresult'": (
        "{{ m.content }}",
        "{{ m.content if m.role != 'tool' }}",
    ),
    "message 5 (assistant): content 'zanswer'": (
        "{{ m.content }}",
        "{{ m.content if m.content != 'zanswer' }}!",
    ),
    "tool 1: description 'Tells the time of a city.'": (
        "{{ tools | tojson }}",
        "get_time city Its name. unit hours minutes",
    ),
    "tool 1: unit.enum 'minutes'": (
        "{{ tools | tojson }}",
        "get_time Tells the time of a city. city Its name. unit hours",
    ),
    "tool 1: parameter 'unit'": (
        "{{ tools | tojson }}",
        "get_time Tells the time of a city. city Its name. hours minutes",
    ),
}


def built(tiny: Any, source: str, **options: Any) -> Renderer:
    """A renderer with this template."""
    task = SimpleNamespace(kind="conversation", chat_template="none", train_on="all", **options)
    result = Renderer(tiny.tokenizer, task)
    result.use(source)
    return result


def test_a_row_that_is_written_whole_loses_nothing(tiny):
    actual = built(tiny, WHOLE).render(ROW)
    assert (actual.lost, actual.unread, len(actual.sequences)) == ([], [], 1)


@pytest.mark.parametrize("place", PLACES)
def test_each_place_that_a_template_leaves_out_is_named(tiny, place):
    shown, instead = PLACES[place]
    source = WHOLE.replace(shown, instead)
    assert source != WHOLE
    with pytest.raises(Refused, match=re.escape(f"leaves out {place}")):
        built(tiny, source).render(ROW)
    actual = built(tiny, source, on_lost="warn").render(ROW)
    assert len(actual.lost) == 1
    assert actual.sequences


@pytest.mark.parametrize(
    ("shown", "row", "place"),
    [
        # each word is in the text: in a header, or in another message
        ("reasoning_content", [said("assistant", "b", reasoning_content="ss")], "reasoning 'ss'"),
        ("content", [said("assistant", "assistant")], "(assistant): content 'assistant'"),
        (
            "content",
            [said("assistant", "b"), said("user", "b"), said("assistant", "b")],
            "3 (user)",
        ),
    ],
)
def test_a_short_word_counts_only_in_its_own_place(tiny, shown, row, place):
    row = Conversation([said("user", "zq"), *row], "here")
    last = "loop.index > 1" if len(row.messages) == 2 else "loop.index == 3"
    source = WHOLE.replace(f"m.{shown} }}", f"m.{shown} if not ({last}) else '-' }}")
    with pytest.raises(Refused, match=re.escape(place)):
        built(tiny, source).render(row)


def test_without_a_template_calls_reasoning_and_tools_are_named(tiny):
    task = SimpleNamespace(kind="conversation", chat_template="none", train_on="all")
    row = Conversation([said("user", "a"), said("assistant", "b", reasoning_content="why")], "here")
    with pytest.raises(Refused, match="chat_template=none writes only contents, and leaves out"):
        Renderer(tiny.tokenizer, task).render(row)
    with pytest.raises(Refused, match="tool 1: name 'get_time'"):
        Renderer(tiny.tokenizer, task).render(
            Conversation([said("user", "a"), said("assistant", "b")], "here", [TOOL])
        )


def test_the_results_of_calls_need_a_template_that_knows_them():
    row = {"messages": [said("user", "a"), said("tool", "b"), said("assistant", "c")]}
    for name, known in (("chatml", False), ("qwen-2.5", True), ("llama-3.1", True)):
        actual = rendered(name, row)
        assert isinstance(actual, list) is known
        if not known:
            assert "message 2 (tool), since it knows no such role" in actual


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a\n b", "a\n b"),
        ("a\n b", "a\\n b"),
        ('"q"', '\\"q\\"'),
        ('"q"', '\\\\\\"q\\\\\\"'),
        ("é", "\\u00e9"),
        ("<b>", "&lt;b&gt;"),
        ("<b>", "\\u003cb\\u003e"),
        (" a ", "a"),
    ],
)
def test_a_value_may_be_escaped(value, shown):
    assert written(value, f"x{shown}x")
    assert not written(value, "xyz")


def test_numbers_and_truth_are_written_as_json_or_python_do():
    for value, text in itertools.product((True, None, 1.5), ("true null 1.5", "True None 1.5")):
        calls = [{"function": {"name": "f", "arguments": {"k": value}}}]
        messages = [said("assistant", "", tool_calls=calls)]
        assert not list(lost(messages, None, f"f k {text}", {0}))
        assert list(lost(messages, None, "f k", {0}))


def test_messages_are_looked_for_in_their_order():
    messages = [said("user", "a"), said("assistant", "b"), said("user", "a")]
    assert not list(lost(messages, None, "a b a", set()))
    assert [field for field, _ in lost(messages, None, "a b", set())] == [
        "message 3 (user): content 'a'"
    ]


def test_earlier_thoughts_that_are_not_trained_may_be_cut():
    messages = [said("user", "a"), said("assistant", "<think>why</think>b")]
    assert not list(lost(messages, None, "a b", set()))
    assert [field for field, _ in lost(messages, None, "a b", {1})] == [
        "message 2 (assistant): reasoning 'why'"
    ]


def test_keys_and_variables_that_the_template_does_not_name_are_unread(tiny):
    messages = [said("user", "a", mood="good"), said("assistant", "b", score=3, tool_call_id="1")]
    row = Conversation(messages, "here", variables={"mood": "good"}, unread=("column 'id'",))
    actual = built(tiny, WHOLE).render(row)
    assert actual.unread == [
        "column 'id'",
        "chat_template_kwargs 'mood'",
        "message key 'mood'",
        "message key 'score'",
    ]


def test_what_is_lost_and_unread_is_counted_and_said_once(tiny):
    source = WHOLE.replace("{{ m.reasoning_content }}", "")
    maker, report = built(tiny, source, on_lost="warn"), Report()
    rows = [said("user", "a"), said("assistant", "b", reasoning_content="why")]
    for _ in range(3):
        example = Conversation(rows, "here", unread=("column 'id'",))
        assert take("here", render_one(example, maker)[1], maker, 99, "raise", "raise", report)
    assert report.lost == {"reasoning of role assistant": 3}
    assert report.notes() == [
        "the chat template leaves out reasoning of role assistant (3 rows)",
        "nothing reads column 'id' (3 rows)",
    ]


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_a_marker_in_any_place_of_any_shape_is_trained_or_refused(name):
    """The law on all templates: a word in each place of a row occurs in the ids, or the row is
    refused."""
    places = 0
    for shape, row in SHAPES.items():
        for path in list(_places(row)):
            marked = _with(row, path, "zqx7")
            actual = rendered(name, marked)
            if isinstance(actual, str):
                continue
            texts = [renderer(name).tokenizer.decode(sequence.ids) for sequence in actual]
            assert any("zqx7" in text for text in texts), (shape, path)
            places += 1
    assert places > 5


def _places(value: Any, path: tuple[Any, ...] = ()) -> Any:
    """Yield where the texts of a row are that must reach the model."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key in ("role", "id", "type", "tool_call_id", "required", "name") and path:
                continue
            yield from _places(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _places(item, (*path, index))
    elif isinstance(value, str) and value:
        yield path


def _with(value: Any, path: tuple[Any, ...], word: str) -> Any:
    """Return a copy of a row with a word in place of what is at a path."""
    if not path:
        return f'{{"city": "{word}"}}' if value.startswith("{") and "city" in value else word
    first, *rest = path
    if isinstance(value, dict):
        return {k: _with(v, tuple(rest), word) if k == first else v for k, v in value.items()}
    return [_with(v, tuple(rest), word) if i == first else v for i, v in enumerate(value)]
