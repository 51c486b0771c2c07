"""Prompts of a measurement are rendered as the rows of training are: with tools and variables."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tasks.reading import DataError
from tasks.task import Conversation
from tests.conftest import write_rows
from trainer.data.render import Renderer
from trainer.evaluation import questions
from trainer.evaluation.questions import Prompts, Question, read_prompts, read_questions

TOOLS = [{"type": "function", "function": {"name": "area", "parameters": {"type": "object"}}}]
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% if brief is defined %}<brief>{{ brief }}</brief>{% endif %}"
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def run(tiny, tmp_path):
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    task = SimpleNamespace(
        kind="conversation", chat_template=str(tmp_path / "t.jinja"), train_on="last"
    )
    renderer = Renderer(tiny.tokenizer, task)
    return SimpleNamespace(base=tiny, stops=[2], task=task, renderer=renderer)


ROW = {
    "messages": [
        {"role": "developer", "content": "Use the tools."},
        {"role": "user", "content": "3 by 4?"},
        {"role": "assistant", "content": "12"},
    ],
    "tools": TOOLS,
    "chat_template_kwargs": {"brief": "yes"},
}


def expected(run, messages):
    answer = {"role": "assistant", "content": "12"}
    example = Conversation([*messages, answer], "", TOOLS, variables={"brief": "yes"})
    return run.renderer.prompt(example)


def test_tools_and_variables_of_a_row_reach_its_prompt(run, tmp_path):
    file = write_rows(tmp_path / "prompts.jsonl", [ROW])
    (ids,), _ = questions.prompt_ids(run, 0, read_prompts(str(file)))
    assert ids == expected(run, ROW["messages"][:-1])
    text = run.base.tokenizer.decode(ids)
    assert '"name": "area"' in text
    assert "<brief>yes</brief>" in text
    assert "<system>Use the tools." in text  # a developer is the template's system


def test_they_stay_for_further_turns(run, tmp_path):
    row = {"turns": ["3 by 4?", "And 5 by 6?"], "tools": TOOLS}
    row["chat_template_kwargs"] = {"brief": "yes"}
    (question,) = read_questions(str(write_rows(tmp_path / "bench.jsonl", [row])))
    assert (question.messages, question.further) == (
        [{"role": "user", "content": "3 by 4?"}],
        ["And 5 by 6?"],
    )
    later = [
        *question.messages,
        {"role": "assistant", "content": "12"},
        {"role": "user", "content": "And 5 by 6?"},
    ]
    assert Prompts(run).ids(question, later) == expected(run, later)


def test_held_out_questions_are_asked_as_evaluation_asks_them(run, monkeypatch):
    """The law: whatever a held-out row has is in the prompt."""
    example = Conversation(ROW["messages"], "", TOOLS, variables={"brief": "yes"})
    prompts = [(example, run.renderer.prompt(example))]
    run.config = {}
    data = SimpleNamespace(held_out=SimpleNamespace(prompts=prompts))
    monkeypatch.setattr(questions, "load_data", lambda *arguments, **named: data)
    monkeypatch.setattr(questions, "add_prompts", lambda *arguments: None)
    (question,) = questions.held_out_questions(run, 1)
    assert Prompts(run).ids(question) == prompts[0][1]


def test_a_prompt_that_the_template_refuses_is_no_traceback(run):
    question = Question("all", [{"role": "user", "content": "x"}], variables={"messages": 1})
    with pytest.raises(DataError, match="a prompt cannot be rendered: chat_template_kwargs sets"):
        Prompts(run).ids(question)


def test_a_file_of_prompts_may_have_a_byte_order_mark_other_line_ends_and_any_separator(tmp_path):
    file = tmp_path / "prompts.jsonl"
    for text in ('{"prompt": "a\u2028b\x85c"}', '{"question_id": 1, "turns": ["a\u2028b\x85c"]}'):
        file.write_bytes(f"\ufeff{text}\r\n".encode())
        (question,) = read_questions(str(file))
        assert question.messages[-1]["content"] == "a\u2028b\x85c"
