"""Prompts and questions for measurements of a run's model: from a file, or from held-out rows."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.reading import DataError
from trainer.assembly.rows import add_prompts, load_data
from trainer.assembly.trained import Trained
from trainer.data.encoding import plain_ids


@dataclass(frozen=True)
class Question:
    """A prompt, and the user's further turns."""

    category: str
    messages: list[dict[str, Any]]
    further: list[str] = field(default_factory=list)


def read_prompts(path: str) -> list[list[dict[str, Any]]]:
    """Read the conversations of a file, each up to the last answer, which is left out.

    Raises:
        DataError: the file cannot be read, or a line has neither form.
    """
    prompts = []
    for number, row in _rows(path):
        prompt, messages = (
            (row.get("prompt"), row.get("messages")) if isinstance(row, dict) else (None, None)
        )
        if isinstance(prompt, str):
            messages = [{"role": "user", "content": prompt}]
        elif not (
            isinstance(messages, list)
            and messages
            and all(isinstance(message, dict) and "content" in message for message in messages)
        ):
            raise DataError(
                f'{path}:{number}: a line is {{"prompt": "..."}} or {{"messages": [...]}} with at'
                " least one message"
            )
        prompts.append(messages[:-1] if messages[-1].get("role") == "assistant" else messages)
    if not all(prompts):
        raise DataError(f"{path}: a conversation of one answer has no prompt")
    if not prompts:
        raise DataError(f"prompts={path} is empty")
    return prompts


def read_questions(path: str, each: int | None = None) -> list[Question]:
    """Read the questions of a file in Spec-Bench's layout or that of `read_prompts`: the first
    `each` of each category.

    Raises:
        DataError: the file cannot be read, or a line has no known form.
    """
    rows = _rows(path)
    first = rows[0][1] if rows else None
    if not (isinstance(first, dict) and "turns" in first):
        return _first([Question("all", messages) for messages in read_prompts(path)], each)
    questions = []
    for number, row in rows:
        turns = row.get("turns") if isinstance(row, dict) else None
        if not (
            isinstance(turns, list)
            and turns
            and all(isinstance(turn, str) and turn.strip() for turn in turns)
        ):
            raise DataError(
                f'{path}:{number}: a line is {{"question_id": ..., "category": "...", "turns":'
                ' ["...", ...]} with at least one turn'
            )
        messages = [{"role": "user", "content": turns[0]}]
        questions.append(Question(str(row.get("category", "all")), messages, turns[1:]))
    return _first(questions, each)


def held_out_questions(run: Trained, count: int) -> list[Question]:
    """Return the first held-out conversations of a run, without their last answer.

    Raises:
        DataError: the run has none.
    """
    if run.task.kind != "conversation":
        raise DataError(
            "this run continues plain text and holds out no conversations: give prompts=FILE.jsonl"
        )
    data = load_data(run.config, run.base, run.task, train=False)
    if data.held_out is None:
        raise DataError(
            "this run's task has no held-out rows: it had task.eval_fraction=0 and no"
            " task.eval_path. Give prompts=FILE.jsonl"
        )
    add_prompts(data, count, run.stops)
    return [Question("held out", example.messages[:-1]) for example, _ in data.held_out.prompts]


def held_out_prompts(run: Trained, count: int) -> tuple[list[list[int]], list[int]]:
    """Return (the first held-out prompts of a run as token ids, stop tokens).

    Raises:
        DataError: the run has none.
    """
    if run.task.kind != "conversation":
        raise DataError(
            "heldout takes the prompts of conversations, and this run continues plain text: give"
            " prompt or prompts"
        )
    data = load_data(run.config, run.base, run.task, train=False)
    if data.held_out is None:
        raise DataError(
            "this run's task has no held-out rows: it had task.eval_fraction=0 and no"
            " task.eval_path"
        )
    add_prompts(data, count, run.stops)
    return [ids for _, ids in data.held_out.prompts], data.held_out.stops


class Prompts:
    """Conversations as a run's model reads them."""

    def __init__(self, run: Trained):
        self.tokenizer = run.base.tokenizer
        self.stops = run.stops
        self.renderer = run.renderer if run.task.kind == "conversation" else None

    def ids(self, messages: list[dict[str, Any]]) -> list[int]:
        """Return token ids; a run on plain text reads the last message alone.

        Raises:
            DataError: the prompt is empty.
        """
        if self.renderer is None:
            ids = plain_ids(self.tokenizer, messages[-1]["content"])
        else:
            ids = self.renderer.chat(messages)
        if not ids:
            raise DataError("a prompt is empty, and this model starts from at least one token")
        return ids


def prompt_ids(
    run: Trained, heldout: int, conversations: list[list[dict[str, Any]]]
) -> tuple[list[list[int]], list[int]]:
    """Return (prompts as token ids, stop tokens) of the first `heldout` held-out conversations, or
    with 0 of the given ones.

    Raises:
        DataError: the task has no such prompts.
    """
    if heldout:
        return held_out_prompts(run, heldout)
    prompts = Prompts(run)
    return [prompts.ids(messages) for messages in conversations], prompts.stops


def _rows(path: str) -> list[tuple[int, Any]]:
    """Return (line number, value) of each line of a JSON lines file."""
    try:
        lines = Path(path).expanduser().read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompts={path} cannot be read: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append((number, json.loads(line)))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number} is no JSON: {error}") from None
    return rows


def _first(questions: list[Question], each: int | None) -> list[Question]:
    by_category: dict[str, list[Question]] = {}
    for question in questions:
        by_category.setdefault(question.category, []).append(question)
    return [question for category in by_category.values() for question in category[:each]]
