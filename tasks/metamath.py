"""MetaMathQA (arXiv 2309.12284; MIT) in the setting of PEFT's board: questions and worked answers
as plain text, without a chat template, and every token is trained.

    {"query": "Gracie and Joe are choosing numbers ...", "response": "... The answer is: \\sqrt{5}"}

becomes

    Question: Gracie and Joe are choosing numbers ... Think step by step.
    Answer: ... The answer is: \\sqrt{5}

GSM8K's `question` and `answer` are read as well, which is what the board tests. `exact_match` is
the board's accuracy: what follows the last mark of an answer, as a number where it is one.

Differs from the board: prompt and answer are tokenised apart, as the prompt is at inference.
"""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal, DivisionByZero, InvalidOperation
from typing import Any

from tasks.reading import DataError
from tasks.task import Chats, Conversation

# The marks of the board's code, in its order: the first that occurs counts.
MARKS = (
    "The answer is: ",
    "The answer is ",
    "The final answer is: ",
    "The final answer is ",
    "#### ",
)
PROMPT = "Question: {query} Think step by step.\nAnswer:"


def answer_of(text: str) -> str | None:
    """Return what follows the last mark of a text, up to the line's end; None without a mark."""
    text = text.strip().rstrip(".!?")
    mark = next((mark for mark in MARKS if mark in text), None)
    if mark is None:
        return None
    return text.rpartition(mark)[2].strip().partition("\n")[0].strip(" .!?$%")


def value_of(text: str | None) -> float | str | None:
    """Return an answer as a number if it is one, or a fraction; otherwise as it is."""
    if text is None:
        return None
    numerator, slash, denominator = text.partition("/")
    try:
        value = Decimal(numerator.strip())
        return float(value / Decimal(denominator.strip()) if slash else value)
    except (DivisionByZero, InvalidOperation, ValueError, OverflowError):
        return text


def right(answer: str, expected: str) -> bool:
    """Return whether an answer's result is the expected one's."""
    value = value_of(answer_of(answer))
    return value is not None and value == value_of(answer_of(expected))


def accuracy(pairs: Iterable[tuple[str, str]]) -> float:
    """Return the share of (answer, expected) that are right."""
    graded = [right(answer, expected) for answer, expected in pairs]
    return sum(graded) / len(graded) if graded else 0.0


class MetaMath(Chats):
    """Questions and worked answers, as the board prompts."""

    metrics = ["exact_match"]
    train_on = "everything"

    def conversation(self, row: dict[str, Any], where: str) -> Conversation:
        names = ("question", "answer") if "question" in row else ("query", "response")
        query, answer = (self.text(row, name) for name in names)
        if answer_of(answer) is None:
            raise DataError(
                f"the answer must have its result after {MARKS[0].strip()!r} or"
                f" {MARKS[-1].strip()!r}, and ends in {answer[-40:]!r}"
            )
        return self.pair(PROMPT.format(query=query), answer, where)

    def grade(self, example: Conversation, completion: str) -> dict[str, float]:
        return {"exact_match": float(right(completion, example.reference))}
