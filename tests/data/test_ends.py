"""The end tokens are those that trained answers really end in."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from tasks.reading import Bad
from tasks.task import Conversation, Text
from tests.toys.other_end import SPECIALS, tokenizer
from trainer.assembly.rows import Data
from trainer.data import ends
from trainer.data.lengths import Report
from trainer.data.render import Renderer

IM_END, EOT, EOM = (SPECIALS.index(t) for t in ("<|im_end|>", "<|endoftext|>", "<|eom|>"))
# Calls end in <|eom|>, other answers in <|im_end|>, as Llama 3's in <|eom_id|> and <|eot_id|>. A
# thought ends in <|eom|> too, and its answer follows, as gpt-oss's <|end|> does.
TWO_ENDS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{% if m['content'].startswith('hm') %}hm<|eom|>{% endif %}{{ m['content'] }}"
    "{{ '<|eom|>' if m['content'].startswith('call') else '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def renderer(template: str | None = "chatml", kind: str = "conversation", train_on: str = "all"):
    words = tokenizer()
    if template == "two":
        words.chat_template, template = TWO_ENDS, None
    return Renderer(
        words, SimpleNamespace(kind=kind, chat_template=template, train_on=train_on, labels=["a"])
    )


def chat(*answers: str) -> Conversation:
    messages = [
        {"role": role, "content": text}
        for answer in answers
        for role, text in (("user", "a"), ("assistant", answer))
    ]
    return Conversation(messages, "here")


class Table:
    """Rows as the tokenised table gives them, in chunks of two."""

    def __init__(self, rows, longest, truncated=0):
        self.rows, self.report = rows, Report(longest=longest, truncated=truncated)

    def tokens(self):
        for start in range(0, len(self.rows), 2):
            some = self.rows[start : start + 2]
            yield (
                np.array([i for row in some for i in row.ids]),
                np.array([t for row in some for t in row.trained]),
                np.cumsum([0, *(len(row.ids) for row in some)]),
            )


def measured(built: Renderer, *examples: Conversation | Text, cut: int | None = None):
    rows = [built(example) for example in examples]
    for row in rows:
        row.ids, row.trained = row.ids[:cut], row.trained[:cut]
    longest = max(len(row.ids) for row in rows)
    return ends.of_rows(Table(rows, longest, 0 if cut is None else len(rows)), built)


def test_the_end_is_the_templates_and_not_the_tokenizers():
    built = renderer()
    assert built.tokenizer.eos_token_id == EOT
    assert measured(built, chat("b"), chat("b", "c"), chat("d")) == [IM_END]
    assert ends.of_examples(iter([chat("b"), Bad("there", "broken"), chat("b")]), built) == [IM_END]
    assert ends.of_template(built) == [IM_END]


def test_several_ends_stand_by_their_number():
    built = renderer("two")
    rows = [chat("call x", "b"), chat("b"), chat("call x", "c")]
    assert measured(built, *rows) == [IM_END, EOM]
    assert ends.of_examples(rows, built) == [IM_END, EOM]
    assert measured(built, chat("call x"), chat("call y"), chat("b")) == [EOM, IM_END]


def test_a_token_after_which_the_answer_continues_ends_none():
    built = renderer("two")
    assert measured(built, chat("hm b"), chat("b")) == [IM_END]
    # also where it ends others: the model would stop after its thought
    assert measured(built, chat("hm b"), chat("call x"), chat("b")) == [IM_END]
    # a rare literal of it in a text changes nothing
    often = [chat("call x")] * 200
    assert measured(built, chat("hm b"), *often) == [EOM, IM_END]


def test_a_row_that_was_cut_does_not_end_there():
    built = renderer()
    row = built(chat("b<|eom|>cdefghi", "z"))
    at = row.ids.index(EOM) + 1
    assert row.trained[at - 1]
    assert measured(built, chat("b<|eom|>cdefghi", "z"), cut=at) == []


@pytest.mark.parametrize("train_on", ["all", "last", "everything"])
def test_what_is_trained_changes_no_end(train_on):
    built = renderer("two", train_on=train_on)
    rows = [chat("call x", "b")] * 3
    if train_on == "everything":  # the table does not show where the answers end
        assert measured(built, *rows) is None
    actual = ends.of_examples(rows, built)
    assert actual == ([IM_END] if train_on == "last" else [IM_END, EOM])
    assert built.train_on == train_on


def test_without_a_template_and_in_texts_it_is_the_tokenizers():
    assert measured(renderer("none"), chat("b"), chat("c")) == [EOT]
    text = renderer(None, "text")
    assert measured(text, Text("abc", ""), Text("ab<|endoftext|>c", "")) == [EOT]
    assert ends.of_template(text) == []
    assert measured(renderer(None, "label"), Text("abc", "")) == []


@pytest.mark.parametrize(
    ("own", "trained", "expected"),
    [
        (None, [], [EOT]),
        (7, [], [EOT, 7]),
        ([9, 7], [IM_END], [IM_END, EOT, 7, 9]),
        (EOT, [EOM, IM_END], [IM_END, EOT, EOM]),
    ],
)
def test_stops_are_the_trained_ends_the_tokenizers_and_the_models(own, trained, expected):
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=own))
    assert ends.stop_ids(tokenizer(), model, trained) == expected
    assert ends.stop_ids(tokenizer(), None, trained) == sorted({EOT, *trained})


def test_a_record_is_read_with_its_own_tokenizer_only():
    words = tokenizer()
    content = {"answer_ends": ends.record([IM_END, EOM], words)}
    assert content == {"answer_ends": {"<|im_end|>": IM_END, "<|eom|>": EOM}}
    assert ends.recorded(content, words) == [IM_END, EOM]
    assert ends.recorded({"answer_ends": {}}, words) == []
    for broken in (
        {},
        {"answer_ends": [IM_END]},
        {"answer_ends": {"<|im_end|>": EOM}},
        {"answer_ends": {"<|im_end|>": 10**6}},
        {"answer_ends": {"<|im_end|>": "2"}},
    ):
        assert ends.recorded(broken, words) is None


def test_a_run_that_continues_another_keeps_its_ends():
    rows = SimpleNamespace(examples=lambda split: iter([chat("b"), chat("c")]))
    data = Data(rows, renderer(), None, None, None, {})
    data.earlier_ends = [EOM, IM_END]
    assert data.ends == [IM_END, EOM]
