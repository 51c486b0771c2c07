"""Sequence classification: a text, or a pair of texts, and its class.

{"text": "hide new secretions from the parental units", "label": "negative"}
{"text": "A man plays a flute.", "text_pair": "A man makes music.", "label": "entailment"}
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from typing import Any

from tasks.reading import Bad, DataError
from tasks.task import Labelled, Splits, column, text_of, weight_fingerprint, weight_of

PAIR = "text_pair"  # our name of the column with the second text


class Classification:
    """Texts or pairs of texts, each with one of a fixed set of classes."""

    kind = "label"
    problem = "single_label_classification"  # transformers' name of what is learnt
    metrics: list[str] = []  # torchmetrics computes accuracy and F1 over the whole split
    streaming = False

    def __init__(
        self,
        path: str | list[str],
        split: str,
        eval_path: str | list[str] | None,
        eval_split: str,
        eval_fraction: float,
        limit: int | None,
        eval_limit: int | None,
        columns: dict[str, str],
        labels: list | None,
        on_bad: str,
        weight_column: str | None,
        **more: Any,
    ):
        self.splits = Splits.of(
            path, split, eval_path, eval_split, eval_fraction, limit, eval_limit, **more
        )
        self.eval_sets = list(self.splits.more)
        self.columns, self.configured, self.on_bad = dict(columns), labels, on_bad
        self.weight_column = weight_column

    @functools.cached_property
    def labels(self) -> list[str]:
        """The classes in order: those of the config, or those of the training rows.

        Raises:
            DataError: there are fewer than two, or two of them are one class written in two ways.
        """
        if self.configured is not None:
            labels = [str(label) for label in self.configured]
        else:
            labels = sorted(set(self._labels_of_rows()), key=_by_value)
            _refuse_alike(labels)
        if len(labels) < 2:
            where = self.splits.train.name if self.configured is None else "task.labels"
            raise DataError(
                f"{where} has {len(labels)} classes"
                f" ({', '.join(labels) or 'none'}); classification needs two or more"
            )
        return labels

    def _labels_of_rows(self) -> Iterator[str]:
        for _, row in self.splits.rows("train"):
            if not isinstance(row, Bad):
                # `examples` reports rows without a label
                with contextlib.suppress(DataError):
                    yield from self.labels_of(row)

    def labels_of(self, row: dict[str, Any]) -> list[str]:
        """Return the classes that a row names.

        Raises:
            DataError: it names none, or not as text or a number.
        """
        return [self._label(row)]

    @functools.cached_property
    def pairs(self) -> bool:
        """Return whether rows are pairs of texts: task.columns names a `text_pair`, or the first
        row has a column of that name."""
        if PAIR in self.columns:
            return True
        first = next((row for _, row in self.splits.rows("train")), None)
        return first is not None and not isinstance(first, Bad) and PAIR in first

    def labelled(self, row: dict[str, Any], where: str) -> Labelled:
        """Return the example of a row.

        Raises:
            DataError: the row lacks a column, or a text or its label cannot be used.
        """
        label = self.target(row)
        text = text_of(column(row, self.columns, "text"), "text")
        second = text_of(column(row, self.columns, PAIR), PAIR) if self.pairs else None
        return Labelled(text, label, where, second)

    def target(self, row: dict[str, Any]) -> str | float | list[str]:
        """Return what a row's text is labelled with.

        Raises:
            DataError: the row has no label, or one of none of the classes.
        """
        label = self._label(row)
        if label not in self.labels:
            raise DataError(f"the class {label!r} is none of: {', '.join(self.labels)}")
        return label

    def _label(self, row: dict[str, Any]) -> str:
        label = column(row, self.columns, "label")
        if not isinstance(label, str | int | float) or not str(label).strip():
            raise DataError(
                f"label must be the name or number of a class, and is {type(label).__name__}:"
                f" {str(label)[:60]!r}"
            )
        return str(label)

    def examples(self, split: str) -> Iterator[Labelled | Bad]:
        for where, row in self.splits.rows(split):
            if isinstance(row, Bad):
                yield row
                continue
            try:
                example = self.labelled(row, where)
                example.weight = weight_of(row, self.columns, self.weight_column)
                yield example
            except DataError as error:
                yield Bad(where, str(error))

    def fingerprint(self, split: str) -> str:
        weight = weight_fingerprint(self.weight_column)
        return (
            f"{self.splits.fingerprint(split)} {sorted(self.columns.items())} {self.labels}{weight}"
        )

    def grade(self, example: Labelled, completion: str) -> dict[str, float]:
        return {}


def _refuse_alike(labels: list[str]) -> None:
    """Refuse classes that differ by blanks alone, or are the same number, such as 1 and 1.0."""
    first: dict[Any, str] = {}
    for label in labels:
        key: Any = label.strip()
        with contextlib.suppress(ValueError):
            key = float(key)
        if (other := first.setdefault(key, label)) != label:
            raise DataError(
                f"the classes {other!r} and {label!r} are one class written in two ways: write one,"
                " or list the classes in task.labels"
            )


def _by_value(label: str) -> tuple[bool, int, str]:
    """Return a sort key: numbers by their value, then names."""
    number = re.fullmatch(r"-?\d+", label) is not None
    return not number, int(label) if number else 0, label
