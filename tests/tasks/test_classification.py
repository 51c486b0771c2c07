"""Texts and their classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tasks.classification import Classification
from tasks.reading import Bad, DataError
from tasks.task import Labelled
from tests.conftest import write_rows
from tests.toys import tasks as toys


def task(path: Path, **changes: Any) -> Classification:
    return Classification(str(path), **toys.SPLITS | {"columns": {}, "labels": None} | changes)


def labelled(folder: Path, *labels: Any) -> Path:
    return write_rows(
        folder / "rows.jsonl",
        [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)],
    )


def test_a_row_becomes_a_text_with_its_class_and_line(tmp_path):
    file = labelled(tmp_path, "yes", "no")
    assert list(task(file).examples("train")) == [
        Labelled("text 0", "yes", f"{file}:1"),
        Labelled("text 1", "no", f"{file}:2"),
    ]


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_separated_values_are_read_by_their_header(tmp_path, kind):
    file = tmp_path / f"rows.{kind}"
    mark = {"csv": ",", "tsv": "\t"}[kind]
    file.write_text(f"sentence{mark}class\ngood{mark}1\nbad{mark}0\n")
    actual = task(file, columns={"text": "sentence", "label": "class"})
    assert actual.labels == ["0", "1"]
    assert [(row.text, row.label) for row in actual.examples("train")] == [
        ("good", "1"),
        ("bad", "0"),
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["b", "a", "b"], ["a", "b"]),
        ([10, 9, -1, 9], ["-1", "9", "10"]),
        (["10", "9", "x"], ["9", "10", "x"]),
        (["--1", "²", "-", "3"], ["3", "-", "--1", "²"]),
        ([True, False], ["False", "True"]),
        ([1.5, 0.5], ["0.5", "1.5"]),
    ],
)
def test_the_classes_of_the_training_rows_are_sorted_numbers_by_value(
    tmp_path, arguments, expected
):
    assert task(labelled(tmp_path, *arguments)).labels == expected


def test_classes_that_are_given_keep_their_order_and_may_have_no_row(tmp_path):
    assert task(labelled(tmp_path, 1, 0), labels=[2, 1, 0]).labels == ["2", "1", "0"]


def test_the_classes_are_those_of_all_training_rows_and_of_no_other(tmp_path):
    file = labelled(tmp_path, *(str(n % 7) for n in range(40)), "rare")
    actual = task(file, eval_fraction=0.2)
    trained = {row.label for row in actual.examples("train")}
    assert trained - {"rare"} == set("0123456")
    assert actual.labels == sorted(trained)
    assert len(list(actual.examples("train"))) + len(list(actual.examples("eval"))) == 41
    assert task(file, limit=3).labels == ["0", "1", "2"]


def test_a_class_that_only_evaluation_has_is_a_bad_row(tmp_path):
    file = labelled(tmp_path, "a", "b")
    other = write_rows(tmp_path / "eval.jsonl", [{"text": "t", "label": "c"}])
    assert list(task(file, eval_path=str(other)).examples("eval")) == [
        Bad(f"{other}:1", "the class 'c' is none of: a, b")
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"text": "t"},
            "no column 'label'; the row has: text; set task.columns={label: YOUR_COLUMN}",
        ),
        (
            {"label": "a"},
            "no column 'text'; the row has: label; set task.columns={text: YOUR_COLUMN}",
        ),
        (
            {"text": "t", "label": None},
            "label must be the name or number of a class, and is NoneType: 'None'",
        ),
        ({"text": "t", "label": ""}, "label must be the name or number of a class, and is str: ''"),
        (
            {"text": "t", "label": ["a"]},
            "label must be the name or number of a class, and is list: \"['a']\"",
        ),
        ({"text": " ", "label": "a"}, "text is empty"),
        ({"text": 5, "label": "a"}, "text must be text, and is int: '5'"),
    ],
)
def test_a_broken_row_is_bad_with_its_line_and_adds_no_class(tmp_path, row, reason):
    rows = [{"text": "t", "label": "a"}, row, {"text": "t", "label": "b"}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    actual = task(file)
    assert actual.labels == ["a", "b"]
    assert [row for row in actual.examples("train") if isinstance(row, Bad)] == [
        Bad(f"{file}:2", reason)
    ]


def test_a_line_that_is_no_json_is_bad(tmp_path):
    file = labelled(tmp_path, "a", "b")
    file.write_text(file.read_text() + "nonsense\n")
    assert list(task(file).examples("train"))[2] == Bad(
        f"{file}:3", "not JSON: Expecting value at column 1"
    )


@pytest.mark.parametrize("labels", [["yes", "yes ", "no"], [1, 1.0, 0], ["01", 1, 2]])
def test_one_class_in_two_ways_is_refused(tmp_path, labels):
    with pytest.raises(DataError, match="are one class written in two ways"):
        assert task(labelled(tmp_path, *labels)).labels


@pytest.mark.parametrize(
    ("labels", "arguments", "message"),
    [
        (["a", "a"], None, r"1 classes \(a\)"),
        ([None], None, r"0 classes \(none\)"),
        (["a", "b"], ["a"], r"task\.labels has 1 classes \(a\)"),
    ],
)
def test_fewer_than_two_classes_are_refused(tmp_path, labels, arguments, message):
    with pytest.raises(DataError, match=message + "; classification needs two or more"):
        task(labelled(tmp_path, *labels), labels=arguments).labels


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"labels": ["a", "b"]}, True),
        ({"labels": ["b", "a"]}, False),
        ({"columns": {"text": "label"}}, False),
    ],
)
def test_the_digest_follows_the_classes_order_and_the_columns(tmp_path, change, same):
    file = labelled(tmp_path, "a", "b")
    assert (task(file).fingerprint("train") == task(file, **change).fingerprint("train")) is same
