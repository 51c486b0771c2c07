"""GSM8K: rows, and what counts as the answer's number."""

from __future__ import annotations

import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tasks.gsm8k import GSM8K, last, marked
from tasks.reading import Bad, DataError
from tasks.task import Conversation
from tests.conftest import ROOT, write_rows
from tests.toys import tasks as toys

REAL = ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl"
ROW = {"question": "What are 2 and 3?", "answer": "2+3=<<2+3=5>>5\n#### 5"}


def task(path: Path, **changes: Any) -> GSM8K:
    return GSM8K(str(path), **toys.CHATS | changes)


def test_a_row_becomes_a_question_and_its_worked_answer(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [ROW])
    chat = [
        {"role": "user", "content": ROW["question"]},
        {"role": "assistant", "content": ROW["answer"]},
    ]
    assert list(task(file).examples("train")) == [
        Conversation(chat, f"{file}:1", None, ROW["answer"])
    ]
    (reported,) = task(file, system="Think.").examples("train")
    assert reported.messages == [{"role": "system", "content": "Think."}, *chat]


def test_other_columns_are_named(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"problem": "q", "solution": "#### 1"}])
    (actual,) = task(file, columns={"question": "problem", "answer": "solution"}).examples("train")
    assert (actual.messages[0]["content"], actual.reference) == ("q", "#### 1")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"question": "q"},
            "no column 'answer'; the row has: question; set task.columns={answer: YOUR_COLUMN}",
        ),
        (
            {"q": "q", "a": "5"},
            "no column 'question'; the row has: q, a; set task.columns={question: YOUR_COLUMN}",
        ),
        ({"question": "q", "answer": " "}, "answer is empty"),
        ({"question": "q", "answer": 5}, "answer must be text, and is int: '5'"),
        (
            {"question": "q", "answer": "It is 5."},
            "the answer must have its number after ####, and ends in 'It is 5.'",
        ),
        (
            {"question": "q", "answer": "#### five"},
            "the answer must have its number after ####, and ends in '#### five'",
        ),
    ],
)
def test_a_broken_row_is_bad_with_its_line(tmp_path, row, reason):
    file = write_rows(tmp_path / "rows.jsonl", [ROW, row, ROW])
    first, second, third = task(file).examples("train")
    assert second == Bad(f"{file}:2", reason)
    assert isinstance(first, Conversation)
    assert isinstance(third, Conversation)


def test_a_file_of_an_unknown_kind_is_an_error(tmp_path):
    (tmp_path / "rows.xml").write_text("<a/>")
    with pytest.raises(DataError, match=r"rows\.xml is of an unknown kind"):
        task(tmp_path / "rows.xml")


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"chat_template": "none"}, True),
        ({"system": "S"}, False),
        ({"limit": 1}, False),
    ],
)
def test_the_digest_follows_what_the_rows_depend_on(tmp_path, change, same):
    file = write_rows(tmp_path / "rows.jsonl", [ROW])
    assert (task(file).fingerprint("train") == task(file, **change).fingerprint("train")) is same


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("so 5.\n#### 72", "72", "72"),
        ("####72", "72", "72"),
        ("#### 1,080", "1080", "1080"),
        ("#### $1,080.00 dollars", "1080", "1080"),
        ("#### 72.50\n", "72.5", "72.5"),
        ("#### 72.", "72", "72"),
        ("#### -5", "-5", "-5"),
        ("#### \u22125", "-5", "-5"),
        ("#### -$5", "-5", "-5"),
        ("#### $-5", "-5", "-5"),
        ("#### .5", "0.5", "0.5"),
        ("#### 0072", "72", "72"),
        ("#### 10%", "10", "10"),
        ("#### 5 apples of 9", "5", "9"),
        ("#### 5\n#### 6", "5", "6"),
        ("#### 5\n\nQuestion: what are 3 and 4?", "5", "4"),
        ("It is 72", None, "72"),
        ("It is $1,080.", None, "1080"),
        ("We have 7-5", None, "5"),
        ("We have 7 - 5", None, "5"),
        ("We lost -$ 5", None, "-5"),
        ("It is (3)-4", None, "4"),
        ("It fell to -4 degrees", None, "-4"),
        ("2+3=<<2+3=5>>5", None, "5"),
        ("one of 3, 4", None, "4"),
        ("#### \n5", None, "5"),
        ("#### about 5", None, "5"),
        ("#### 5/6", None, "6"),
        ("#### 1,5", None, "5"),
        ("#### 1,0800", None, "0800"),
        ("#### 1.5.2", None, ".2"),
        ("### 5", None, "5"),
        ("#### five", None, None),
        ("", None, None),
        ("####", None, None),
    ],
)
def test_numbers_are_found(text, strict, flexible):
    assert marked(text) == (None if strict is None else Decimal(strict))
    assert last(text) == (None if flexible is None else Decimal(flexible))


@pytest.mark.parametrize(
    ("completion", "exact", "flexible"),
    [
        ("#### 1080", 1.0, 1.0),
        ("#### $1,080.00", 1.0, 1.0),
        ("That makes 1,080 clips.", 0.0, 1.0),
        ("#### 1081", 0.0, 0.0),
        ("1080 clips in 2 months", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_an_answer_is_graded_strictly_and_flexibly(tmp_path, completion, exact, flexible):
    actual = task(
        write_rows(tmp_path / "rows.jsonl", [{"question": "q", "answer": "540 * 2\n#### 1,080"}])
    )
    (example,) = actual.examples("train")
    assert actual.grade(example, completion) == {"exact_match": exact, "flexible": flexible}
    assert list(actual.grade(example, completion)) == actual.metrics


def test_no_text_takes_long():
    for text in (
        "1," * 50_000,
        "9" * 50_000,
        "#" * 50_000,
        "#### " + "$" * 50_000,
        "-" * 50_000,
        "#### " + " " * 50_000,
    ):
        marked(text)
        last(text)


@pytest.mark.long
@pytest.mark.skipif(not REAL.is_file(), reason="../shared/data/gsm8k_train.jsonl is not there")
def test_the_real_answers_are_right_and_those_of_other_questions_mostly_not():
    actual = task(REAL)
    examples = list(actual.examples("train"))
    assert len(examples) == 7473
    others = random.Random(0).sample(examples, len(examples))
    assert all(
        actual.grade(example, example.reference) == {"exact_match": 1.0, "flexible": 1.0}
        for example in examples
    )
    chance = [
        actual.grade(example, other.reference)
        for example, other in zip(examples, others, strict=True)
    ]
    for metric in actual.metrics:
        assert sum(scores[metric] for scores in chance) < 0.03 * len(examples)
