"""Supervised fine-tuning on chats and prompt-answer pairs, from files or the hub.

A row, in one of the four formats of tasks/conversation.py:

    {"messages": [{"role": "user", "content": "2 + 3 ="}, {"role": "assistant", "content": "5"}]}

A generated answer is graded against the row's last assistant message.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from tasks import conversation
from tasks.reading import Bad, DataError
from tasks.task import Conversation, Splits, weight_fingerprint


class SFT:
    """Conversations; the answers are trained."""

    kind = "conversation"

    def __init__(
        self,
        path: str | list[str],
        split: str,
        eval_path: str | list[str] | None,
        eval_split: str,
        eval_fraction: float,
        limit: int | None,
        eval_limit: int | None,
        format: str,
        columns: dict[str, str],
        system: str | None,
        chat_template: str | None,
        train_on: str,
        metric: str,
        streaming: bool,
        shuffle_block: int,
        on_bad: str,
        on_lost: str,
        weight_column: str | None,
        chat_template_kwargs: dict[str, Any],
        **more: Any,
    ):
        self.splits = Splits.of(
            path, split, eval_path, eval_split, eval_fraction, limit, eval_limit, streaming, **more
        )
        self.eval_sets = list(self.splits.more)
        self.format, self.columns, self.system = format, dict(columns), system
        self.chat_template, self.train_on = chat_template, train_on
        self.metric, self.metrics = metric, [metric]
        self.streaming, self.shuffle_block, self.on_bad = streaming, shuffle_block, on_bad
        self.on_lost, self.weight_column = on_lost, weight_column
        self.chat_template_kwargs = dict(chat_template_kwargs)

    def examples(self, split: str) -> Iterator[Conversation | Bad]:
        format_ = self.format
        for where, row in self.splits.rows(split):
            if isinstance(row, Bad):
                yield row
                continue
            # The first readable row decides. If it fits no format, no row will: an error at once.
            if format_ == "auto":
                try:
                    format_ = conversation.detect(row, self.columns)
                except DataError as error:
                    raise DataError(f"{where}: {error}") from None
            try:
                yield conversation.convert(
                    row, format_, self.columns, self.system, where, self.weight_column
                )
            except DataError as error:
                yield Bad(where, self._another(row, format_) or str(error))

    def _another(self, row: dict[str, Any], format_: str) -> str:
        """Return why a row in another format than the first is refused, "" for other rows."""
        with contextlib.suppress(DataError):
            own = conversation.detect(row, self.columns)
            if self.format == "auto" and own != format_:
                return (
                    f"its columns are of the format {own}, and those of the first row of {format_}:"
                    " give each format a file of its own, as parts of task=mixture"
                )
        return ""

    def fingerprint(self, split: str) -> str:
        weight = weight_fingerprint(self.weight_column)
        return (
            f"{self.splits.fingerprint(split)} {self.format} {sorted(self.columns.items())}"
            f" {self.system}{weight}"
        )

    def grade(self, example: Conversation, completion: str) -> dict[str, float]:
        return {self.metric: score(self.metric, completion, example.reference)}


def score(metric: str, completion: str, reference: str) -> float:
    """Return the score of a generated answer against the reference, in [0, 1]. A run of white space
    counts as one blank."""
    answer, expected = (re.sub(r"\s+", " ", text).strip() for text in (completion, reference))
    if metric == "exact_match":
        return float(answer == expected)
    if metric == "contains":
        return float(expected in answer)
    if not answer or not expected:
        return float(answer == expected)
    from torchmetrics.functional import text

    # No n-grams longer than the texts: with BLEU's 4-grams, a right answer of three words would
    # score 0.
    words = min(len(answer.split()), len(expected.split()))
    if metric == "bleu":
        n_gram = min(4, words)
        return float(text.sacre_bleu_score([answer], [[expected]], n_gram=n_gram, smooth=True))
    letters = min(len(answer.replace(" ", "")), len(expected.replace(" ", "")))
    chrf: Any = text.chrf_score(
        [answer], [[expected]], n_char_order=min(6, letters), n_word_order=min(2, words)
    )
    return float(chrf)
