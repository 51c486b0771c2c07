"""Plain text as rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tasks.completion import Completion
from tasks.reading import Bad
from tasks.task import Text
from tests.conftest import write_rows
from tests.toys import tasks as toys


def task(path: Path, **changes: Any) -> Completion:
    settings = {"columns": {}, "streaming": False, "shuffle_block": 10}
    return Completion(str(path), **toys.SPLITS | settings | changes)


@pytest.mark.parametrize("streaming", [False, True])
def test_paragraphs_of_a_text_file_are_the_rows(tmp_path, streaming):
    file = tmp_path / "rows.txt"
    file.write_text("one\ntwo\n\n\nthree\n")
    assert list(task(file, streaming=streaming).examples("train")) == [
        Text("one\ntwo", f"{file}:1"),
        Text("three", f"{file}:5"),
    ]


def test_a_column_may_have_another_name_and_keeps_its_blanks(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"body": "  a\n", "text": "not this"}])
    assert list(task(file, columns={"text": "body"}).examples("train")) == [
        Text("  a\n", f"{file}:1")
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_several_kinds_of_files_are_one_text_after_the_other(tmp_path, streaming):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.csv").write_text("text\nthree\n")
    write_rows(tmp_path / "c.jsonl", [{"text": "four"}, {"text": "five"}])
    actual = task(tmp_path / "*", streaming=streaming, limit=4).examples("train")
    assert [row.text for row in actual] == ["one", "two", "three", "four"]


def test_held_out_texts_are_not_trained(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"text": str(n)} for n in range(10)])
    train, held_out = (
        [row.text for row in task(file, eval_fraction=0.3).examples(split)]
        for split in ("train", "eval")
    )
    assert (len(train), len(held_out)) == (7, 3)
    assert sorted(train + held_out) == [str(n) for n in range(10)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"body": "a"},
            "no column 'text'; the row has: body; set task.columns={text: YOUR_COLUMN}",
        ),
        ({"text": None}, "text must be text, and is NoneType: 'None'"),
        ({"text": {"a": 1}}, "text must be text, and is dict: \"{'a': 1}\""),
        ({"text": "\n "}, "text is empty"),
    ],
)
def test_a_broken_row_is_bad_with_its_line(tmp_path, row, reason):
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}, row])
    assert list(task(file).examples("train")) == [Text("a", f"{file}:1"), Bad(f"{file}:2", reason)]


def test_text_in_another_encoding_is_bad_with_its_line(tmp_path):
    file = tmp_path / "rows.txt"
    file.write_bytes(b"one\n\n\xe9\n")
    assert list(task(file).examples("train")) == [
        Text("one", f"{file}:1"),
        Bad(f"{file}:3", "not UTF-8 at byte 1 of the line"),
    ]


def test_a_stream_holds_nothing_out_and_does_not_count_its_rows(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}])
    streamed = task(file, streaming=True, eval_fraction=0.5)
    assert (len(list(streamed.examples("train"))), list(streamed.examples("eval"))) == (1, [])


@pytest.mark.parametrize(
    ("change", "same"),
    [({"shuffle_block": 3}, True), ({"columns": {"text": "b"}}, False), ({"limit": 1}, False)],
)
def test_the_digest_follows_columns_and_limit(tmp_path, change, same):
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "a", "b": "c"}])
    assert (task(file).fingerprint("train") == task(file, **change).fingerprint("train")) is same
