"""Texts and their numbers, and texts with several classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tasks.multi_label import MultiLabel
from tasks.reading import Bad
from tasks.regression import Regression
from tasks.task import Labelled
from tests.conftest import write_rows
from tests.toys import tasks as toys

SHARED = toys.SPLITS | {"columns": {}}


def regression(folder: Path, *labels: Any) -> Regression:
    rows = [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]
    return Regression(str(write_rows(folder / "rows.jsonl", rows)), **SHARED)


def multi_label(folder: Path, *labels: Any, **changes: Any) -> MultiLabel:
    rows = [{"text": f"text {i}", "labels": label} for i, label in enumerate(labels)]
    path = str(write_rows(folder / "rows.jsonl", rows))
    return MultiLabel(path, **{**SHARED, "labels": None, **changes})


def test_a_row_becomes_a_text_with_its_number(tmp_path):
    task = regression(tmp_path, 1, -2.5, "3e1")
    where = tmp_path / "rows.jsonl"
    assert list(task.examples("train")) == [
        Labelled(f"text {i}", value, f"{where}:{i + 1}")
        for i, value in enumerate([1.0, -2.5, 30.0])
    ]
    assert (task.labels, task.problem) == (["value"], "regression")


@pytest.mark.parametrize("label", [None, "good", True, [1.0], "nan", "inf", ""])
def test_what_is_no_number_is_bad(tmp_path, label):
    (row,) = regression(tmp_path, label).examples("train")
    assert row == Bad(
        f"{tmp_path / 'rows.jsonl'}:1", f"label must be a number, and is {str(label)!r}"
    )


def test_a_number_whose_square_is_infinite_is_bad(tmp_path):
    (row,) = regression(tmp_path, -1e30).examples("train")
    assert isinstance(row, Bad)
    assert "label must be below 1e+18, and is '-1e+30'" in row.reason


def test_a_row_becomes_a_text_with_all_of_its_classes(tmp_path):
    task = multi_label(tmp_path, ["drama", "comedy"], [], ["comedy", 7])
    assert task.labels == ["7", "comedy", "drama"]
    assert [row.label for row in task.examples("train")] == [
        ["drama", "comedy"],
        [],
        ["comedy", "7"],
    ]


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ("drama", "labels must be a list of names or numbers of classes, as [comedy, drama] or []"),
        ([1.5], "labels must be a list of names or numbers"),
        (["a", "a"], "labels has a class twice"),
        (["c"], "the class 'c' is none of: a, b"),
    ],
)
def test_what_is_no_list_of_classes_is_bad(tmp_path, label, reason):
    task = multi_label(tmp_path, ["a"], label, labels=["a", "b"])
    good, bad = task.examples("train")
    assert good.label == ["a"]
    assert isinstance(bad, Bad)
    assert reason in bad.reason
