"""The conversations whose answers a target is asked for: read from a file or from a task, and
batched by their lengths."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tasks import conversation, reading
from tasks.reading import Bad, DataError
from tasks.wheel import sha256

SPAN = 50  # batches' worth of rows, within which those of similar length share a batch


@dataclass(frozen=True)
class PromptRow:
    """A conversation to be answered: assistant messages whose content is None are written by the
    target."""

    row: int
    where: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


def load(options: dict[str, Any], plain: dict[str, Any], task: Any) -> tuple[list[PromptRow], str]:
    """(the conversations to be answered, a digest of what they come from), by the options of
    trainer.respond.

    Raises:
        DataError: there are none, one is broken, or the task's rows are no conversations.
    """
    every, skip, limit = options["answers"] == "all", options["skip"], options["rows"]
    if options["prompts"] is not None:
        source = reading.Source(options["prompts"], "train", False, "prompts")
        read = {name: plain["task"][name] for name in ("columns", "format", "system")}
        found = list(asks(iter(source), read, options["field"], every, skip, limit))
        key = sha256(source.files[0]) if len(source.files) == 1 else source.fingerprint()
    else:
        if task.kind != "conversation":
            raise DataError(f"task={options['task']}: its rows are no conversations")
        examples = enumerate(task.examples(options["split"]))
        found = []
        for index, example in itertools.islice(
            examples, skip, None if limit is None else skip + limit
        ):
            if isinstance(example, Bad):
                raise DataError(f"{example.where}: {example.reason}")
            found.append(
                PromptRow(index, example.where, _open(example.messages, every), example.tools)
            )
        key = task.fingerprint(options["split"])
    if not found:
        raise DataError(
            f"{options['prompts'] or options['task']}: there is no row after the first {skip}"
        )
    return found, hashlib.sha256(key.encode()).hexdigest() if options["prompts"] is None else key


def asks(
    rows: Iterator[tuple[str, Any]],
    read: dict[str, Any],
    field: str | None,
    every: bool,
    skip: int,
    limit: int | None,
) -> Iterator[PromptRow]:
    """The conversations of some (where, row) of a file, read by the `columns`, `format` and
    `system` of conf/task/sft.

    Raises:
        DataError: a row has nothing to answer, or is broken.
    """
    for index, (where, row) in enumerate(
        itertools.islice(rows, None if limit is None else skip + limit)
    ):
        if index < skip:
            continue
        if isinstance(row, Bad):
            raise DataError(f"{row.where}: {row.reason}")
        try:
            messages, tools = _messages(row, field, **read)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        yield PromptRow(index, where, _open(messages, every or "turns" in row), tools)


def _messages(
    row: dict[str, Any], field: str | None, columns: dict[str, str], format: str, system: str | None
) -> tuple[list[dict[str, Any]], Any]:
    """A row's messages, checked as task=sft checks them, with some answer wherever one is to be
    written."""
    name = field or next(
        (name for name in ("messages", "turns", "prompt", "question") if name in row), None
    )
    if name is None or (field is None and (columns or format != "auto")):
        kind = conversation.detect(row, columns) if format == "auto" else format
        found = conversation.convert(row, kind, columns, system, "")
        return found.messages, found.tools
    if name not in row:
        raise DataError(f"no column {name!r}; the row has: {', '.join(map(str, row))}")
    value = row[name] if isinstance(row[name], list) else [row[name]]
    if all(isinstance(item, str) for item in value):
        if not all(text.strip() for text in value):
            raise DataError(f"{name} is empty")
        given = [
            message
            for text in value
            for message in (
                {"role": "user", "content": text},
                {"role": "assistant", "content": "."},
            )
        ]
    else:
        given = list(value)
        if isinstance(given[-1], dict) and given[-1].get("role") != "assistant":
            given.append({"role": "assistant", "content": "."})
    found = conversation.convert(
        {"messages": given, "tools": row.get("tools")}, "messages", {}, system, ""
    )
    return found.messages, found.tools


def _open(messages: list[dict[str, Any]], every: bool) -> list[dict[str, Any]]:
    """The messages with None where the target writes."""
    return [
        (
            {"role": "assistant", "content": None}
            if message["role"] == "assistant"
            and (place == len(messages) or (every and not message.get("tool_calls")))
            else message
        )
        for place, message in enumerate(messages, 1)
    ]


def batches(found: list[PromptRow], size: int, done: set[int]) -> Iterator[list[PromptRow]]:
    """Conversations that are missing, with those that share their batch: within spans of the file,
    those of similar length."""
    for start in range(0, len(found), SPAN * size):
        span = found[start : start + SPAN * size]
        if all(ask.row in done for ask in span):
            continue
        lengths = {
            ask.row: sum(len(message["content"] or "") for message in ask.messages) for ask in span
        }
        span.sort(key=lambda ask: -lengths[ask.row])
        for first in range(0, len(span), size):
            if any(ask.row not in done for ask in span[first : first + size]):
                yield span[first : first + size]
