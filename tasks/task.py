"""The interface of tasks: examples of two splits, and a grade for a generated answer."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from tasks import reading, sources
from tasks.reading import Bad, DataError

# Columns of the rows that graft respond writes, which say how an answer came about.
MARKS = {"row": int, "cut": bool, "inexact": bool}


@dataclass
class Conversation:
    """Messages as in OpenAI's API. Grading compares a generated last answer with `reference`."""

    messages: list[dict[str, Any]]
    where: str
    tools: list[dict[str, Any]] | None = None
    reference: Any = None
    untrained: frozenset[int] = frozenset()  # indices of answers that are not trained
    variables: dict[str, Any] = field(default_factory=dict)  # for the chat template
    weight: float = 1.0  # of the row in the loss
    unread: tuple[str, ...] = ()  # what the row has and nothing reads


class Read(dict[str, Any]):
    """A row that records which of its columns are read."""

    def __init__(self, row: dict[str, Any]):
        super().__init__(row)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a column's value, or `default` if the row has none."""
        self.names.add(name)
        return super().get(name, default)

    def unread(self) -> list[str]:
        """Return the columns that were not read and hold something that a user may miss."""
        return [
            name
            for name, value in self.items()
            if name not in self.names
            and value is not None
            and value != ""
            and type(value) is not MARKS.get(name)
        ]


@dataclass
class Text:
    """Plain text, every token of which is trained."""

    text: str
    where: str
    weight: float = 1.0  # of the row in the loss


@dataclass
class Labelled:
    """A text, or a pair of texts, and its label: a class, a number, or several classes."""

    text: str
    label: str | float | list[str]
    where: str
    second: str | None = None  # of a pair
    weight: float = 1.0  # of the row in the loss


Example = Conversation | Text | Labelled


class Task(Protocol):
    """A data set and how to grade it. Made from conf/task/NAME.yaml."""

    kind: str  # of its examples: conversation | text | label
    streaming: bool
    on_bad: str
    metrics: list[str]  # the names of the scores that `grade` returns

    def examples(self, split: str) -> Iterator[Example | Bad]:
        """Yield all rows of `train` or `eval`, in order; a broken row comes as `Bad`."""
        ...

    def fingerprint(self, split: str) -> str:
        """Return a text that changes whenever the split's examples do."""
        ...

    def grade(self, example: Any, completion: str) -> dict[str, float]:
        """Return the scores of a generated answer, each in [0, 1]."""
        ...


@dataclass
class Splits:
    """Two splits of files or hub data sets: two sources, or one of which a fixed draw holds out
    `eval_fraction`."""

    train: reading.Source
    eval: reading.Source | None
    eval_fraction: float
    limit: int | None
    eval_limit: int | None
    draws: bool = False  # whether rows of `train` are held out
    more: dict[str, tuple[reading.Source, int | None]] = field(default_factory=dict)
    total: int | None = None  # rows of `train`, where they were counted to hold some out

    @classmethod
    def of(
        cls,
        path: Any,
        split: str,
        eval_path: Any,
        eval_split: str,
        eval_fraction: float,
        limit: int | None,
        eval_limit: int | None,
        streaming: bool = False,
        data_files: Any = None,
        revision: str | None = None,
        eval_sets: Mapping[str, Any] | None = None,
    ) -> Splits:
        """Return the splits that the keys shared by the tasks' YAML files describe.

        `data_files` and `revision` are of `path`, and of `eval_path` where it names the same data
        set.

        Raises:
            DataError: a file is missing, or of an unknown kind.
        """
        source = reading.Source(path, split, streaming, "task.path", data_files, revision)
        same = {"data_files": data_files, "revision": revision} if eval_path == path else {}
        evaluation = (
            reading.Source(eval_path, eval_split, streaming, "task.eval_path", **same)
            if eval_path is not None
            else None
        )
        splits = cls(source, evaluation, eval_fraction, limit, eval_limit)
        splits.more = sources.further(eval_sets or {}, streaming, eval_split, eval_limit)
        if splits.more and evaluation is None and not eval_fraction:
            raise DataError(
                "task.eval_sets are measured next to the held-out rows: set task.eval_path, or"
                " task.eval_fraction above 0"
            )
        splits.draws = evaluation is None and eval_fraction > 0 and not streaming
        if not reading.is_later():
            assert splits.held_out is not None  # too few rows are said at once
        return splits

    @functools.cached_property
    def held_out(self) -> set[int]:
        """The numbers of the rows of `train` that are held out.

        Raises:
            DataError: there are too few rows.
        """
        if not self.draws:
            return set()
        rows = self.total = sum(1 for _ in self.train)
        if rows < 2:
            raise DataError(
                f"{self.train.name} has {rows} rows, too few to hold some out: set"
                " task.eval_fraction=0 or task.eval_path"
            )
        count = min(rows - 1, max(1, round(rows * self.eval_fraction)))
        return set(random.Random(rows).sample(range(rows), count))

    def rows(self, split: str) -> Iterator[tuple[str, Any]]:
        """Yield (where, row) of `train`, `eval` or `eval/NAME`; the row is a mapping or Bad."""
        if split.startswith("eval/"):
            further, limit = self.more[split.removeprefix("eval/")]
            yield from itertools.islice(further, limit)
            return
        source = self.eval if split == "eval" and self.eval is not None else self.train
        if split == "eval" and self.eval is None and not self.held_out:
            return
        limit, count = (self.eval_limit if split == "eval" else self.limit), 0
        for index, (where, row) in enumerate(source):
            if self.eval is None and (index in self.held_out) != (split == "eval"):
                continue
            if limit is not None and count >= limit:
                return
            count += 1
            yield where, row

    def count(self, split: str) -> int | None:
        """Return the number of rows of a split, None if it is not known before they are read."""
        if self.total is None or split not in ("train", "eval"):
            return None
        held_out = split == "eval"
        rows = len(self.held_out) if held_out else self.total - len(self.held_out)
        limit = self.eval_limit if held_out else self.limit
        return rows if limit is None else min(rows, limit)

    def fingerprint(self, split: str) -> str:
        """Return a text that changes whenever the rows of a split do."""
        if split.startswith("eval/"):
            further, limit = self.more[split.removeprefix("eval/")]
            return f"{further.fingerprint()} {split} {limit}"
        source = self.eval if split == "eval" and self.eval is not None else self.train
        has_eval = self.eval is not None
        limit = self.eval_limit if split == "eval" else self.limit
        return f"{source.fingerprint()} {has_eval} {sorted(self.held_out)} {split} {limit}"


class Chats:
    """A data set whose rows become conversations one by one. A subclass defines `conversation` and
    `grade`."""

    kind = "conversation"
    streaming = False
    train_on = "all"

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
        system: str | None,
        chat_template: str | None,
        on_bad: str,
        on_lost: str,
        chat_template_kwargs: dict[str, Any],
        weight_column: str | None,
        **more: Any,
    ):
        self.splits = Splits.of(
            path, split, eval_path, eval_split, eval_fraction, limit, eval_limit, **more
        )
        self.weight_column = weight_column
        self.on_lost, self.chat_template_kwargs = on_lost, dict(chat_template_kwargs)
        self.eval_sets = list(self.splits.more)
        self.columns, self.system, self.chat_template, self.on_bad = (
            dict(columns),
            system,
            chat_template,
            on_bad,
        )

    def conversation(self, row: dict[str, Any], where: str) -> Conversation:
        """Return the conversation of one row.

        Raises:
            DataError: the row cannot be used.
        """
        raise NotImplementedError

    def examples(self, split: str) -> Iterator[Conversation | Bad]:
        for where, row in self.splits.rows(split):
            if isinstance(row, Bad):
                yield row
                continue
            try:
                example = self.conversation(row, where)
                example.weight = weight_of(row, self.columns, self.weight_column)
                read = f"column {self.columns.get(str(self.weight_column), self.weight_column)!r}"
                example.unread = tuple(name for name in example.unread if name != read)
                yield example
            except DataError as error:
                yield Bad(where, str(error))

    def pair(self, prompt: str, answer: str, where: str) -> Conversation:
        """Return a prompt and its answer, after the task's system prompt if it has one."""
        messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return Conversation(messages, where, reference=answer)

    def text(self, row: dict[str, Any], name: str) -> str:
        """Return a row's text by our name for the column; see `column` and `text_of`."""
        return text_of(column(row, self.columns, name), name)

    def fingerprint(self, split: str) -> str:
        weight = weight_fingerprint(self.weight_column)
        return (
            f"{self.splits.fingerprint(split)} {sorted(self.columns.items())} {self.system}{weight}"
        )


def weight_fingerprint(name: str | None) -> str:
    """Return what a column of weights adds to a task's fingerprint: nothing without one."""
    return "" if name is None else f" weight={name}"


def weight_of(row: dict[str, Any], columns: dict[str, str], name: str | None) -> float:
    """Return a row's weight in the loss by the name of its column; 1 without such a column.

    Raises:
        DataError: the row has no such column, or it holds no number of at least 0.
    """
    if name is None:
        return 1.0
    value = column(row, columns, name)
    if isinstance(value, str):  # of a csv file
        try:
            value = float(value)
        except ValueError:
            value = None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
        raise DataError(f"{name} is {value!r}, expected a number of at least 0: the row's weight")
    return float(value)


def column(row: dict[str, Any], columns: dict[str, str], name: str) -> Any:
    """Return a row's value by our name for the column.

    Raises:
        DataError: the row has no such column. The message lists those that it has.
    """
    actual = columns.get(name, name)
    if actual not in row:
        hint = f"; set task.columns={{{name}: YOUR_COLUMN}}" if name not in columns else ""
        raise DataError(f"no column {actual!r}; the row has: {', '.join(map(str, row))}{hint}")
    return row[actual]


def text_of(value: Any, name: str) -> str:
    """Return the value if it is a text that is not empty.

    Raises:
        DataError: it is no string, or empty.
    """
    if not isinstance(value, str):
        raise DataError(f"{name} must be text, and is {type(value).__name__}: {str(value)[:60]!r}")
    if not value.strip():
        raise DataError(f"{name} is empty")
    return value
