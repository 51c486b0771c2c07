"""What a task is: examples of two splits, and how a generated answer is graded."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from tasks import reading
from tasks.reading import Bad, DataError


@dataclass
class Conversation:
    """Messages as OpenAI writes them. `reference` is what grading compares a generated last answer
    with."""

    messages: list[dict[str, Any]]
    where: str
    tools: list[dict[str, Any]] | None = None
    reference: Any = None


@dataclass
class Text:
    """Plain text, all of it trained."""

    text: str
    where: str


@dataclass
class Labelled:
    """A text and its class."""

    text: str
    label: str
    where: str


Example = Conversation | Text | Labelled


class Task(Protocol):
    """A data set and how to grade it. Made from conf/task/NAME.yaml."""

    kind: str  # conversation | text | label: what its examples are
    streaming: bool
    on_bad: str
    metrics: list[str]  # what `grade` returns, by name

    def examples(self, split: str) -> Iterator[Example | Bad]:
        """All rows of `train` or `eval`, in order; a broken row comes as `Bad`."""
        ...

    def fingerprint(self, split: str) -> str:
        """A digest that changes whenever the split's examples do."""
        ...

    def grade(self, example: Any, completion: str) -> dict[str, float]:
        """Scores of a generated answer, each in [0, 1]."""
        ...


@dataclass
class Splits:
    """Two splits of files or hub data sets: given apart, or `eval_fraction` held out of one by a
    fixed draw."""

    train: reading.Source
    eval: reading.Source | None
    eval_fraction: float
    limit: int | None
    eval_limit: int | None
    held_out: set[int] = field(default_factory=set)

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
    ) -> Splits:
        """From the keys that the tasks' YAML files share.

        Raises:
            DataError: a file is missing, or of an unknown kind.
        """
        source = reading.Source(path, split, streaming, "task.path")
        other = (
            reading.Source(eval_path, eval_split, streaming, "task.eval_path")
            if eval_path is not None
            else None
        )
        splits = cls(source, other, eval_fraction, limit, eval_limit)
        if other is None and eval_fraction > 0 and not streaming:
            rows = sum(1 for _ in splits.train)
            if rows < 2:
                raise DataError(
                    f"{source.name} has {rows} rows, too few to hold some out: set"
                    " task.eval_fraction=0 or task.eval_path"
                )
            splits.held_out = set(
                random.Random(rows).sample(
                    range(rows), min(rows - 1, max(1, round(rows * eval_fraction)))
                )
            )
        return splits

    def rows(self, split: str) -> Iterator[tuple[str, Any]]:
        """(where, row) of `train` or `eval`; the row is a mapping or Bad."""
        source = self.eval if split == "eval" and self.eval is not None else self.train
        if split == "eval" and self.eval is None and not self.held_out:
            return
        limit, given = (self.eval_limit if split == "eval" else self.limit), 0
        for index, (where, row) in enumerate(source):
            if self.eval is None and (index in self.held_out) != (split == "eval"):
                continue
            if limit is not None and given >= limit:
                return
            given += 1
            yield where, row

    def fingerprint(self, split: str) -> str:
        source = self.eval if split == "eval" and self.eval is not None else self.train
        apart = self.eval is not None
        limit = self.eval_limit if split == "eval" else self.limit
        return f"{source.fingerprint()} {apart} {sorted(self.held_out)} {split} {limit}"


class Chats:
    """A data set whose rows become conversations one by one. Its file says how (`conversation`) and
    grades them."""

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
    ):
        self.splits = Splits.of(
            path, split, eval_path, eval_split, eval_fraction, limit, eval_limit
        )
        self.columns, self.system, self.chat_template, self.on_bad = (
            dict(columns),
            system,
            chat_template,
            on_bad,
        )

    def conversation(self, row: dict[str, Any], where: str) -> Conversation:
        """One row's conversation.

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
                yield self.conversation(row, where)
            except DataError as error:
                yield Bad(where, str(error))

    def pair(self, prompt: str, answer: str, where: str) -> Conversation:
        """A prompt and its answer, behind the task's system prompt, if it has one."""
        messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return Conversation(messages, where, reference=answer)

    def text(self, row: dict[str, Any], name: str) -> str:
        """A row's text by our name for the column; see `column` and `text_of`."""
        return text_of(column(row, self.columns, name), name)

    def fingerprint(self, split: str) -> str:
        return f"{self.splits.fingerprint(split)} {sorted(self.columns.items())} {self.system}"


def column(row: dict[str, Any], columns: dict[str, str], name: str) -> Any:
    """A row's value by our name for the column.

    Raises:
        DataError: the row has no such column; the message lists what it has.
    """
    actual = columns.get(name, name)
    if actual not in row:
        hint = f"; set task.columns={{{name}: YOUR_COLUMN}}" if name not in columns else ""
        raise DataError(f"no column {actual!r}; the row has: {', '.join(map(str, row))}{hint}")
    return row[actual]


def text_of(value: Any, name: str) -> str:
    """The value as text that says something.

    Raises:
        DataError: it is no string, or empty.
    """
    if not isinstance(value, str):
        raise DataError(f"{name} must be text, and is {type(value).__name__}: {str(value)[:60]!r}")
    if not value.strip():
        raise DataError(f"{name} is empty")
    return value
