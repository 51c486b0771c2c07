"""Rows in the form that a template reads, and as the texts in which inference shows each answer."""

from __future__ import annotations

import copy
import itertools
import json
from collections import Counter
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tasks import conversation
from tasks.sft import SFT
from tasks.task import Conversation, Text
from tests.conftest import write_rows
from tests.toys import tasks as toys
from tests.toys.chat_templates import (
    TWO,
    A,
    U,
    call,
    rendered,
    renderer,
    said,
    source,
    tokenizer,
    trained,
)
from trainer.data.batches import Collate
from trainer.data.cache_key import cache_key
from trainer.data.chat_template import ChatTemplate, use_day, with_defaults
from trainer.data.encoding import plain_ids
from trainer.data.packing import pack
from trainer.data.render import Renderer
from trainer.data.rows import Rows, tokenise
from trainer.data.streaming import StreamingBatches
from trainer.exporting.serving import Serving
from trainer.models.tiny import CHATML

THOUGHTS = [
    said("user", U),
    said("assistant", "1", reasoning_content="one"),
    said("user", "b"),
    said("assistant", "2", reasoning_content="two"),
]


def texts(name: str, row: dict[str, Any], **options: Any) -> list[str]:
    actual = rendered(name, row, **options)
    assert not isinstance(actual, str), actual
    return [trained(name, sequence) for sequence in actual]


def whole(name: str, row: dict[str, Any]) -> str:
    actual = rendered(name, row)
    assert not isinstance(actual, str), actual
    return tokenizer(name).decode(actual[-1].ids)


def template(text: str, **special: str) -> ChatTemplate:
    return ChatTemplate(text, special, {})


# the form that a template reads


@pytest.mark.parametrize("as_text", [True, False])
def test_arguments_take_the_form_that_the_template_expects(as_text):
    calls = [call("Paris", "abcdefgh1", as_text)]
    row = {"messages": [said("user", U), said("assistant", "", tool_calls=calls)]}
    # as an object, and not as "{\\"city\\": \\"Paris\\"}"
    assert texts("hermes-3", row) == [
        '<tool_call>\n{"name": "get_time", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'
    ]
    # a template that would write a text as a text
    assert texts("llama-3.1", row) == [
        '{"name": "get_time", "parameters": {"city": "Paris"}}<|eot_id|>'
    ]
    # as text: this template appends it to a string
    assert '```json\n{"city": "Paris"}\n```' in texts("deepseek-v3", row)[0]


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        ("c.function.arguments | tojson", False),
        ("c.function.arguments.items() | list", False),
        ("'x' + c.function.arguments", True),
        ("c.function.arguments", True),
    ],
)
def test_a_template_is_asked_once_for_the_form_of_arguments(shown, text):
    loop = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ SHOWN }}{% endfor %}"
    assert template(loop.replace("SHOWN", shown) + "{% endfor %}").takes_text is text


def test_content_is_parts_where_the_template_shows_nothing_else():
    loop = (
        "{% for m in messages %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }};"
        "{% endif %}{% endfor %}{% endfor %}"
    )
    parts, plain = template(loop), template("{% for m in messages %}{{ m.content }};{% endfor %}")
    assert (parts.takes_parts, plain.takes_parts) == (True, False)
    for one in (parts, plain):
        assert one.render(TWO[:2], None, {})[0] == f"{U};{A};"


def test_a_list_that_is_printed_is_not_content_in_parts():
    source = "{% for m in messages %}{{ m.role }}: {{ m.content | capitalize }};{% endfor %}"
    assert not ChatTemplate(source, {}, {}).takes_parts
    assert not ChatTemplate(source.replace("capitalize", "tojson | upper"), {}, {}).takes_parts


def test_thoughts_are_parts_where_the_template_reads_them_there():
    assert renderer("mistral-v13").templates["default"].takes_thoughts_in_parts
    assert not renderer("gpt-oss").templates["default"].takes_thoughts_in_parts
    parts = [{"type": "thinking", "thinking": "why"}, {"type": "text", "text": "b"}]
    row = {"messages": [said("user", U), {"role": "assistant", "content": parts}]}
    assert texts("mistral-v13", row) == ["[THINK]why[/THINK]b</s>"]
    assert texts("qwen-3", row) == ["<think>\nwhy\n</think>\n\nb<|im_end|>"]


def test_a_developer_is_the_system_where_the_template_names_none():
    row = {"messages": [said("developer", "Be brief."), *TWO[:2]]}
    assert whole("chatml", row).startswith("<|im_start|>system\nBe brief.")
    assert "developer<|message|># Instructions\n\nBe brief." in whole("gpt-oss", row)


def test_the_first_token_is_written_once():
    name = "llama-3"
    start = tokenizer(name).bos_token
    loop = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert template(loop, bos_token="<b>").render([said("user", "<b>hi")], None, {})[0] == "<b>hi"
    assert whole(name, {"messages": TWO[:2]}).count(start) == 1

    class Adds:
        bos_token, bos_token_id = "<b>", 7

        def __call__(self, text: str) -> dict[str, list[int]]:
            ids = [7] if text.startswith("<b>") else []
            return {"input_ids": [7, *ids, 1]}

    assert plain_ids(Adds(), "hi") == plain_ids(Adds(), "<b>hi") == [7, 1]


def test_text_alone_has_its_first_token_once(tiny):
    task = SimpleNamespace(kind="text")
    ids = Renderer(tiny.tokenizer, task)(Text("a", "here")).ids
    assert ids == [*tiny.tokenizer("a")["input_ids"], tiny.tokenizer.eos_token_id]


# one text for each turn


def test_each_answer_of_a_template_that_cuts_thoughts_follows_its_own_prompt():
    actual = rendered("qwen-3", {"messages": THOUGHTS})
    assert not isinstance(actual, str)
    for sequence, end in zip(actual, (2, 4), strict=True):
        prompt = renderer("qwen-3").chat(THOUGHTS[: end - 1])
        assert sequence.ids[: len(prompt)] == prompt
        assert not any(sequence.trained[: len(prompt)])
    assert texts("qwen-3", {"messages": THOUGHTS}) == [
        "<think>\none\n</think>\n\n1<|im_end|>",
        "<think>\ntwo\n</think>\n\n2<|im_end|>",
    ]


def test_thoughts_in_content_are_those_of_their_own_column():
    inline = [
        message
        if "reasoning_content" not in message
        else said(
            "assistant",
            f"<think>\n{message['reasoning_content']}\n</think>\n\n{message['content']}",
        )
        for message in THOUGHTS
    ]
    for name in ("qwen-3", "deepseek-r1", "deepseek-r1-distill", "nemotron-nano-2"):
        assert texts(name, {"messages": inline}) == texts(name, {"messages": THOUGHTS}), name


def test_answers_within_one_turn_share_a_text():
    """Calls after the last question keep their thoughts, so what follows does not change them."""
    messages = [
        *THOUGHTS[:3],
        said("assistant", "", reasoning_content="look", tool_calls=[call("Rome", "abcdefgh1")]),
        said("tool", "noon", tool_call_id="abcdefgh1"),
        said("assistant", "2", reasoning_content="two"),
    ]
    actual = texts("qwen-3", {"messages": messages})
    assert len(actual) == 2
    assert "look" in actual[1]
    assert actual[1].count("<|im_end|>") == 2


def test_variables_of_the_template_reach_it_in_training_and_at_inference():
    row = {"messages": TWO[:2], "chat_template_kwargs": {"enable_thinking": False}}
    assert texts("qwen-3", row) == [f"{A}<|im_end|>"]
    options = {"chat_template_kwargs": {"enable_thinking": False}}
    task = SimpleNamespace(
        kind="conversation", chat_template=None, train_on="all", on_lost="error", **options
    )
    one = Renderer(tokenizer("qwen-3"), task)
    sequence = one(Conversation(TWO[:2], "here"))
    assert trained("qwen-3", sequence) == f"{A}<|im_end|>"
    prompt = tokenizer("qwen-3").decode(one.chat(TWO[:1]))
    assert prompt.endswith("assistant\n<think>\n\n</think>\n\n")
    own = Conversation([*TWO[:1], said("assistant", "x")], "here", variables={"messages": []})
    assert "chat_template_kwargs sets messages" in str(rendered_or_reason(one, own))


def test_a_date_is_that_of_the_runs_start():
    dated = copy.deepcopy(tokenizer("qwen-3"))
    dated.chat_template = "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"

    def asked(*starts):
        task = SimpleNamespace(
            kind="conversation", chat_template=None, on_bad="raise", fingerprint=lambda split: "x"
        )
        use_day({"starts": [{"time": time} for time in starts]}, task)
        one = Renderer(dated, task)
        return dated.decode(one.chat(TWO[:1])), cache_key(task, "train", one, 9, "drop")

    first, key = asked("2020-02-03T23:59:59+0000", "2021-01-01T00:00:00+0000")
    assert first.startswith("03 Feb 2020 ")
    today, other = asked()
    assert today.startswith(date.today().strftime("%d %b %Y "))
    assert asked()[1] == other != key


def test_an_export_on_another_day_writes_that_day(tiny, tmp_path):
    (tmp_path / "dated.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + CHATML)
    task = SimpleNamespace(
        kind="conversation", chat_template=str(tmp_path / "dated.jinja"), day=date(2020, 2, 3)
    )
    one = Renderer(tiny.tokenizer, task)
    assert tiny.tokenizer.decode(one.chat(TWO[:1])).startswith("03 Feb 2020")
    Serving(tiny, one, [])._write_tokenizer(tmp_path / "out")  # it is loaded back and compared
    assert "strftime_now" in (tmp_path / "out" / "chat_template.jinja").read_text()


def rendered_or_reason(one: Renderer, example: Conversation) -> Any:
    try:
        return one.render(example)
    except ValueError as error:
        return error


def test_variables_of_training_hold_in_an_exported_template():
    text = with_defaults(source("qwen-3"), {"enable_thinking": False, "names": ["a", None]})
    exported = template(str(text))
    silent = exported.render(TWO[:1], None, {}, prompt=True)[0]
    assert silent.endswith("assistant\n<think>\n\n</think>\n\n")
    thinking = exported.render(TWO[:1], None, {"enable_thinking": True}, prompt=True)[0]
    assert thinking.endswith("assistant\n")
    both = with_defaults({"default": "{{ a }}", "tool_use": "{{ b }}"}, {"a": 1})
    assert isinstance(both, dict)
    assert template(both["default"]).render(TWO[:1], None, {})[0] == "1"


def test_a_closed_thought_asks_for_the_option_that_opens_it():
    row = {"messages": THOUGHTS[:2]}
    assert "{thinking: true}" in str(rendered("deepseek-v3.1", row))
    thinks = row | {"chat_template_kwargs": {"thinking": True}}
    assert texts("deepseek-v3.1", thinks) == ["one\n</think>\n\n1<\uff5cend▁of▁sentence\uff5c>"]


def test_an_empty_thought_is_given_as_an_empty_text():
    row = {"messages": [said("user", U), said("assistant", A, reasoning_content="")]}
    end = "<\uff5cend▁of▁sentence\uff5c>"
    assert texts("deepseek-r1-distill", row) == [f"\n</think>\n\n{A}{end}"]
    assert "opens a thought before message 2" in str(
        rendered("deepseek-r1-distill", {"messages": TWO[:2]})
    )


def test_a_template_that_ends_the_whole_text_keeps_answers_together():
    assert texts("phi-3", {"messages": TWO}) == [
        f"{A}<|end|>|{TWO[3]['content']}<|end|>\n<|endoftext|>"
    ]


# which answers count


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}])
@pytest.mark.parametrize("name", ["chatml", "chatml-marked", "qwen-3", "llama-3.1", "smollm-3"])
def test_an_answer_of_weight_0_is_context_alone(name, flag):
    every = texts(name, {"messages": TWO})
    parts = [part for text in every for part in text.split("|<") for part in [part]]
    first = TWO[0], TWO[1] | flag, TWO[2], TWO[3]
    last = TWO[0], TWO[1], TWO[2], TWO[3] | flag
    assert parts
    without_first = texts(name, {"messages": list(first)})
    without_last = texts(name, {"messages": list(last)})
    assert "".join(without_first).count(A) == 0
    assert "".join(without_first).count(TWO[3]["content"]) == 1
    assert "".join(without_last).count(TWO[3]["content"]) == 0
    assert "".join(without_last).count(A) == 1
    both = {"messages": [TWO[0], TWO[1] | flag]}
    assert "its answers have weight 0" in str(rendered(name, both))


# rows, packs and streams


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))


def task(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> SFT:
    file = write_rows(folder / "rows.jsonl", rows)
    (folder / "qwen.jinja").write_text(source("qwen-3"), "utf-8")
    options = {"chat_template": str(folder / "qwen.jinja"), "shuffle_block": 2}
    return SFT(str(file), **toys.SFT | options | changes)


def made(one: SFT) -> Rows:
    return tokenise(one, "train", Renderer(tokenizer("qwen-3"), one), 512, "raise", 1)


def test_a_row_of_two_turns_is_two_sequences_with_one_place(tmp_path):
    rows = made(task(tmp_path, [{"messages": THOUGHTS}, {"messages": TWO[:2]}]))
    assert (rows.report.rows, rows.report.further, rows.report.kept, len(rows)) == (2, 1, 3, 3)
    assert rows.examples() == [0, 0, 1]
    assert rows.report.summary().startswith("3 of 3 sequences of 2 rows kept")
    assert sorted(itertools.chain(*pack(rows.lengths, 512, 0))) == [0, 1, 2]
    # from the cache
    again = made(task(tmp_path, [{"messages": THOUGHTS}, {"messages": TWO[:2]}]))
    assert (again.digest, again.report) == (rows.digest, rows.report)


def test_a_stream_gives_the_sequences_of_the_table(tmp_path):
    rows_in = [{"messages": THOUGHTS}, {"messages": TWO[:2]}, {"messages": TWO}]
    rows = made(task(tmp_path, rows_in))
    one = task(tmp_path, rows_in, streaming=True)
    config = {
        "max_length": 512,
        "overlong": "raise",
        "max_epochs": 1,
        "seed": 0,
        "batch_size": 1,
        "accumulate": 1,
    }
    stream = StreamingBatches(
        one, Renderer(tokenizer("qwen-3"), one), Collate(0, False, False), config, 9, 0, 0, 1
    )
    seen = Counter(json.dumps([row.ids, row.trained]) for _, row in stream.rows())
    assert seen == Counter(
        json.dumps([row.ids, row.trained]) for row in map(rows.__getitem__, range(len(rows)))
    )


def test_weights_of_rows_travel_with_them_and_0_leaves_a_row_out(tmp_path):
    rows_in = [{"messages": TWO[:2], "w": weight} for weight in (0.5, 0, 2)]
    weighted = made(task(tmp_path, rows_in, weight_column="w"))
    assert weighted.weights is not None
    assert weighted.weights.tolist() == [0.5, 2.0]
    assert (weighted.report.weightless, weighted[0].weight) == (1, 0.5)
    assert "1 of weight 0, left out" in weighted.report.summary()
    plain = made(task(tmp_path, [rows_in[0], rows_in[2]]))
    assert plain.weights is None
    assert plain.report.unread == {"column 'w'": 2}
    assert plain.digest != weighted.digest
    ones = [{"messages": row["messages"], "w": 1} for row in (rows_in[0], rows_in[2])]
    assert made(task(tmp_path, ones, weight_column="w")).digest == plain.digest


def test_a_row_reads_the_same_through_json_lines_and_parquet(tmp_path):
    """Arrow fills structs with nulls, which must not reach the text."""
    import pyarrow
    import pyarrow.parquet

    from tasks.reading import Source

    one = call("Paris", "abcdefgh1")
    other = {"type": "function", "function": {"name": "f", "arguments": {"a": 1, "b": "x"}}}
    rows = [
        {"messages": [said("user", U), said("assistant", "", tool_calls=[each])]}
        for each in (one, other)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    read = [row for _, row in Source(str(tmp_path / "rows.parquet"), "train", False, "task.path")]
    assert [texts("hermes-3", row) for row in read] == [texts("hermes-3", row) for row in rows]
    assert '"arguments": {"city": "Paris"}' in texts("hermes-3", read[0])[0]
    assert conversation.detect(read[0], {}) == "messages"
