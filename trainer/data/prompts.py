"""Conversations whose answers a target writes: read from a file or from a task, and batched by
their lengths."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tasks import conversation, reading
from tasks.reading import Bad, DataError
from tasks.task import Conversation
from tasks.wheel import sha256
from trainer.config.answer_options import PromptOptions

SPAN = 50  # batches of rows, among which those of similar length share a batch


@dataclass(frozen=True)
class PromptRow:
    """A conversation to answer: the target writes the assistant messages whose content is None."""

    row: int
    where: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = field(default_factory=dict)  # for the chat template


def load(options: PromptOptions, config: dict[str, Any], task: Any) -> tuple[list[PromptRow], str]:
    """Return the conversations to answer, and a digest of their source.

    Raises:
        DataError: there are no rows, one is broken, or the task's rows are no conversations.
    """
    every = options.answers == "all"
    if options.prompts is not None:
        source = reading.Source(options.prompts, "train", False, "prompts")
        read = {name: config["task"][name] for name in ("columns", "format", "system")}
        rows = list(
            rows_of_file(iter(source), read, options.field, every, options.skip, options.rows)
        )
        digest = sha256(source.files[0]) if len(source.files) == 1 else source.fingerprint()
    else:
        if task.kind != "conversation":
            raise DataError(f"task={options.task}: its rows are no conversations")
        rows = list(_rows_of_task(task, options.split, every, options.skip, options.rows))
        digest = hashlib.sha256(task.fingerprint(options.split).encode()).hexdigest()
    if not rows:
        raise DataError(
            f"{options.prompts or options.task}: there is no row after the first {options.skip}"
        )
    return rows, digest


def _rows_of_task(
    task: Any, split: str, every: bool, skip: int, limit: int | None
) -> Iterator[PromptRow]:
    stop = None if limit is None else skip + limit
    for index, example in itertools.islice(enumerate(task.examples(split)), skip, stop):
        if isinstance(example, Bad):
            raise DataError(f"{example.where}: {example.reason}")
        messages = _open(example.messages, every)
        yield PromptRow(index, example.where, messages, example.tools, example.variables)


def rows_of_file(
    rows: Iterator[tuple[str, Any]],
    read: dict[str, Any],
    column: str | None,
    every: bool,
    skip: int,
    limit: int | None,
) -> Iterator[PromptRow]:
    """Yield the conversations of some (where, row) of a file. `read` holds `columns`, `format` and
    `system` of conf/task/sft.

    Raises:
        DataError: a row has nothing to answer, or is broken.
    """
    stop = None if limit is None else skip + limit
    for index, (where, row) in enumerate(itertools.islice(rows, stop)):
        if index < skip:
            continue
        if isinstance(row, Bad):
            raise DataError(f"{row.where}: {row.reason}")
        try:
            converted = opened(row, column, **read)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        messages = _open(converted.messages, every or "turns" in row)
        yield PromptRow(index, where, messages, converted.tools, converted.variables)


def opened(
    row: dict[str, Any],
    chosen: str | None,
    columns: dict[str, str],
    format: str,
    system: str | None,
) -> Conversation:
    """Return a row of a file of prompts, checked as task=sft checks it. `chosen` is the column that
    holds the prompt. A message that the target will write has a placeholder as its content.

    Raises:
        DataError: the row has no such column, or is broken.
    """
    name = chosen or next(
        (name for name in ("messages", "turns", "prompt", "question") if name in row), None
    )
    if name is None or (chosen is None and (columns or format != "auto")):
        kind = conversation.detect(row, columns) if format == "auto" else format
        return conversation.convert(row, kind, columns, system, "")
    if name not in row:
        raise DataError(f"no column {name!r}; the row has: {', '.join(map(str, row))}")
    value = row[name] if isinstance(row[name], list) else [row[name]]
    if all(isinstance(item, str) for item in value):
        if not all(text.strip() for text in value):
            raise DataError(f"{name} is empty")
        messages = [
            message
            for text in value
            for message in (
                {"role": "user", "content": text},
                {"role": "assistant", "content": "."},
            )
        ]
    else:
        messages = list(value)
        if isinstance(messages[-1], dict) and messages[-1].get("role") != "assistant":
            messages.append({"role": "assistant", "content": "."})
    rest = {key: row.get(key) for key in ("tools", "functions", "system", "chat_template_kwargs")}
    return conversation.convert(rest | {"messages": messages}, "messages", {}, system, "")


def _open(messages: list[dict[str, Any]], every: bool) -> list[dict[str, Any]]:
    """Return the messages with None as the content of those that the target writes: the last one,
    or with `every` all answers without tool calls."""
    return [
        (
            {"role": "assistant", "content": None}
            if message["role"] == "assistant"
            and (number == len(messages) or (every and not message.get("tool_calls")))
            else message
        )
        for number, message in enumerate(messages, 1)
    ]


def batches(rows: list[PromptRow], size: int, done: set[int]) -> Iterator[list[PromptRow]]:
    """Yield batches that hold at least one row that is not `done`. Rows of similar length within a
    span of the file share a batch, whether or not they are done, so that a continued command
    computes the same batches."""
    for start in range(0, len(rows), SPAN * size):
        span = rows[start : start + SPAN * size]
        if all(row.row in done for row in span):
            continue
        lengths = {
            row.row: sum(len(message["content"] or "") for message in row.messages) for row in span
        }
        span.sort(key=lambda row: -lengths[row.row])
        for first in range(0, len(span), size):
            if any(row.row not in done for row in span[first : first + size]):
                yield span[first : first + size]
