"""Several sets of chats or prompt-answer pairs, each with a weight: how often its rows are seen in
an epoch.

    parts: {sql: {path: sql.jsonl, weight: 2}, chat: {path: chat.jsonl, weight: 0.25}}

Every row of `sql` comes twice in an epoch, and a fixed quarter of `chat`'s once, drawn by the rows'
numbers. Rows are as tasks/sft.py reads them; the trainer shuffles them. Each part holds its own
`eval_fraction` out, or has an `eval_path`, and held-out rows come once whatever the weight is, so
that losses under different weights compare.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

from tasks.reading import Bad, DataError
from tasks.sft import SFT, score
from tasks.task import Conversation

KEYS = {
    "path",
    "weight",
    "split",
    "eval_path",
    "eval_split",
    "limit",
    "format",
    "columns",
    "system",
}


class Mixture:
    """Conversations of several parts; the answers are trained.

    Raises:
        DataError: there are no parts, one lacks its path or has an unknown key, a weight is not
        above 0, or a file is missing.
    """

    kind = "conversation"
    streaming = False

    def __init__(
        self,
        parts: dict[str, dict[str, Any]],
        eval_fraction: float,
        eval_limit: int | None,
        format: str,
        columns: dict[str, str],
        system: str | None,
        chat_template: str | None,
        train_on: str,
        metric: str,
        on_bad: str,
    ):
        if not parts:
            raise DataError("task.parts is empty: give {NAME: {path: FILE, weight: 1}, ...}")
        self.chat_template, self.train_on, self.on_bad = chat_template, train_on, on_bad
        self.metric, self.metrics = metric, [metric]
        shared = {
            "format": format,
            "columns": columns,
            "system": system,
            "split": "train",
            "eval_path": None,
            "eval_split": "test",
        }
        self.parts: dict[str, tuple[SFT, float]] = {}
        for name, given in parts.items():
            place = f"task.parts.{name}"
            if not isinstance(given, dict) or "path" not in given or given.keys() - KEYS:
                raise DataError(
                    f"{place} is {given!r}: a mapping with path, and where wanted"
                    f" {', '.join(sorted(KEYS - {'path'}))}"
                )
            weight = given.get("weight", 1)
            if (
                isinstance(weight, bool)
                or not isinstance(weight, int | float)
                or not 0 < weight < 1000
            ):
                raise DataError(
                    f"{place}.weight is {weight!r}, and must be a number above 0: how often an"
                    " epoch sees each row"
                )
            own = (
                shared
                | {"limit": None}
                | {key: value for key, value in given.items() if key != "weight"}
            )
            try:
                made = SFT(
                    **own,
                    eval_fraction=eval_fraction,
                    eval_limit=eval_limit,
                    chat_template=chat_template,
                    train_on=train_on,
                    metric=metric,
                    streaming=False,
                    shuffle_block=1,
                    on_bad=on_bad,
                )
            except DataError as error:
                raise DataError(f"{place}: {error}") from None
            self.parts[name] = made, float(weight)

    def examples(self, split: str) -> Iterator[Conversation | Bad]:
        for name, (part, weight) in self.parts.items():
            for index, example in enumerate(part.examples(split)):
                yield from itertools.repeat(
                    example, times(name, index, weight) if split == "train" else 1
                )

    def fingerprint(self, split: str) -> str:
        weights = (
            {name: weight for name, (_, weight) in self.parts.items()} if split == "train" else {}
        )
        return (
            f"{[(name, part.fingerprint(split)) for name, (part, _) in self.parts.items()]}"
            f" {weights}"
        )

    def grade(self, example: Conversation, completion: str) -> dict[str, float]:
        return {self.metric: score(self.metric, completion, example.reference)}


def times(part: str, index: int, weight: float) -> int:
    """How often the row of a number comes in an epoch: the whole part of the weight, and once more
    by a fixed draw with the rest of it as its chance."""
    return int(weight) + (random.Random(f"{part} {index}").random() < weight % 1)
