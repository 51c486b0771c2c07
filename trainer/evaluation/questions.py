"""Prompts and questions for measurements of a run's model: from a file, or from held-out rows."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tasks import reading
from tasks.reading import DataError
from tasks.task import Conversation
from trainer.assembly.rows import add_prompts, load_data
from trainer.assembly.trained import Trained
from trainer.data import prompts
from trainer.data.chat_template import Refused
from trainer.data.encoding import continued_ids
from trainer.data.held_out import HeldOut
from trainer.data.stops import Stops


@dataclass(frozen=True)
class Question:
    """A prompt, the user's further turns, and what the chat template gets with them."""

    category: str
    messages: list[dict[str, Any]]
    further: list[str] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = field(default_factory=dict)  # for the chat template


def read_prompts(path: str) -> list[Question]:
    """Read the conversations of a file, each up to the last answer, which is left out. Rows are
    read as task=sft reads them.

    Raises:
        DataError: the file cannot be read, or a line has neither form.
    """
    questions = []
    for where, row in _rows(path):
        messages = row.get("messages")
        if not (isinstance(row.get("prompt"), str) or (isinstance(messages, list) and messages)):
            raise DataError(
                f'{where}: a line is {{"prompt": "..."}} or {{"messages": [...]}} with at'
                " least one message"
            )
        column = "prompt" if isinstance(row.get("prompt"), str) else "messages"
        questions.append(_question(row, column, "all", where))
    if not all(question.messages for question in questions):
        raise DataError(f"{path}: a conversation of one answer has no prompt")
    if not questions:
        raise DataError(f"prompts={path} is empty")
    return questions


def read_questions(path: str, each: int | None = None) -> list[Question]:
    """Read the questions of a file in Spec-Bench's layout or that of `read_prompts`: the first
    `each` of each category.

    Raises:
        DataError: the file cannot be read, or a line has no known form.
    """
    rows = _rows(path)
    if not (rows and "turns" in rows[0][1]):
        return _first(read_prompts(path), each)
    questions = []
    for where, row in rows:
        turns = row.get("turns")
        if not (
            isinstance(turns, list)
            and turns
            and all(isinstance(turn, str) and turn.strip() for turn in turns)
        ):
            raise DataError(
                f'{where}: a line is {{"question_id": ..., "category": "...", "turns":'
                ' ["...", ...]} with at least one turn'
            )
        category = str(row.get("category", "all"))
        first_turn = row | {"turns": turns[:1]}
        question = _question(first_turn, "turns", category, where)
        questions.append(replace(question, further=turns[1:]))
    return _first(questions, each)


def _question(row: dict[str, Any], column: str, category: str, where: str) -> Question:
    """Return a row's conversation without its last answer."""
    try:
        example = prompts.opened(row, column, {}, "auto", None)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    return Question(
        category, example.messages[:-1], tools=example.tools, variables=example.variables
    )


def held_out_questions(run: Trained, count: int) -> list[Question]:
    """Return the first held-out conversations of a run, without their last answer.

    Raises:
        DataError: the run has none.
    """
    return [
        Question(
            "held out", example.messages[:-1], tools=example.tools, variables=example.variables
        )
        for example, _ in _held_out(run, count).prompts
    ]


def held_out_prompts(run: Trained, count: int) -> tuple[list[list[int]], Stops]:
    """Return (the first held-out prompts of a run as token ids, stop tokens).

    Raises:
        DataError: the run has none.
    """
    held_out = _held_out(run, count)
    return [ids for _, ids in held_out.prompts], held_out.stops


def _held_out(run: Trained, count: int) -> HeldOut:
    """Return the held-out rows of a run on conversations, with their first `count` prompts."""
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
    return data.held_out


class Prompts:
    """Conversations as a run's model reads them."""

    def __init__(self, run: Trained):
        self.tokenizer = run.base.tokenizer
        self.stops = run.stops
        self.renderer = run.renderer if run.task.kind == "conversation" else None

    def ids(self, question: Question, messages: list[dict[str, Any]] | None = None) -> list[int]:
        """Return the token ids of a question, or of `messages` with the question's tools. A run on
        plain text reads the last message alone.

        Raises:
            DataError: the prompt is empty, or the chat template refuses it.
        """
        messages = question.messages if messages is None else messages
        if self.renderer is None:
            ids = continued_ids(self.tokenizer, messages[-1]["content"])
        else:
            answer = {"role": "assistant", "content": ""}
            example = Conversation(
                [*messages, answer], "prompt", question.tools, variables=question.variables
            )
            try:
                ids = self.renderer.prompt(example)
            except Refused as refusal:
                raise DataError(f"a prompt cannot be rendered: {refusal}") from None
        if not ids:
            raise DataError("a prompt is empty, and this model starts from at least one token")
        return ids


def prompt_ids(
    run: Trained, heldout: int, questions: list[Question]
) -> tuple[list[list[int]], Stops]:
    """Return (prompts as token ids, stop tokens) of the first `heldout` held-out conversations, or
    with 0 of the questions.

    Raises:
        DataError: the task has no such prompts.
    """
    if heldout:
        return held_out_prompts(run, heldout)
    reader = Prompts(run)
    return [reader.ids(question) for question in questions], reader.stops


def _rows(path: str) -> list[tuple[str, dict[str, Any]]]:
    """Return (place, row) of each line of a JSON lines file."""
    rows = []
    try:
        for where, row in reading.json_lines(Path(path).expanduser()):
            if isinstance(row, reading.Bad):
                raise DataError(f"prompts: {row.where}: {row.reason}")
            rows.append((where, row))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"prompts={path} cannot be read: {error}") from None
    return rows


def _first(questions: list[Question], each: int | None) -> list[Question]:
    by_category: dict[str, list[Question]] = {}
    for question in questions:
        by_category.setdefault(question.category, []).append(question)
    return [question for category in by_category.values() for question in category[:each]]
