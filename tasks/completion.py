"""Plain text, every token of which is trained: a column `text`, or .txt files whose paragraphs are
the rows.

{"text": "The quick brown fox jumps over the lazy dog."}
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tasks.reading import Bad, DataError
from tasks.task import Splits, Text, column, text_of, weight_fingerprint, weight_of


class Completion:
    """Texts. Every token is trained, and the end token after them."""

    kind = "text"

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
        streaming: bool,
        shuffle_block: int,
        on_bad: str,
        weight_column: str | None,
        prompt_tokens: int | None = None,
        **more: Any,
    ):
        self.splits = Splits.of(
            path, split, eval_path, eval_split, eval_fraction, limit, eval_limit, streaming, **more
        )
        self.eval_sets = list(self.splits.more)
        self.columns, self.weight_column = dict(columns), weight_column
        self.streaming, self.shuffle_block, self.on_bad = streaming, shuffle_block, on_bad
        self.prompt_tokens = prompt_tokens
        self.metrics = [] if prompt_tokens is None else ["ttr"]  # by trainer.evaluation.answers

    def examples(self, split: str) -> Iterator[Text | Bad]:
        for where, row in self.splits.rows(split):
            if isinstance(row, Bad):
                yield row
                continue
            try:
                text = text_of(column(row, self.columns, "text"), "text")
                yield Text(text, where, weight_of(row, self.columns, self.weight_column))
            except DataError as error:
                yield Bad(where, str(error))

    def fingerprint(self, split: str) -> str:
        weight = weight_fingerprint(self.weight_column)
        return f"{self.splits.fingerprint(split)} {sorted(self.columns.items())}{weight}"

    def grade(self, example: Text, completion: str) -> dict[str, float]:
        return {}
