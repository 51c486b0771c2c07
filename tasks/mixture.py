"""Several sets of chats or prompt-answer pairs, each with a weight: how often an epoch sees each of
its rows.

    parts: {sql: {path: sql.jsonl, weight: 2}, chat: {path: chat.jsonl, weight: 0.25}}

An epoch sees every row of `sql` twice, and a fixed quarter of the rows of `chat` once, drawn by the
numbers of the rows. Rows are read as tasks/sft.py reads them, and the trainer shuffles them. Each
part holds out its own `eval_fraction`, or has an `eval_path`. Held-out rows come once, whatever the
weight, so that losses under different weights can be compared.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

from tasks import sources
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
    "data_files",
    "revision",
}


class Mixture:
    """Conversations of several parts; the answers are trained.

    Raises:
        DataError: there are no parts, a part has no path or an unknown key, a weight is not above
            0, or a file is missing.
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
        on_lost: str,
        chat_template_kwargs: dict[str, Any],
        eval_sets: dict[str, Any],
        weight_column: str | None,
    ):
        if not parts:
            raise DataError("task.parts is empty: give {NAME: {path: FILE, weight: 1}, ...}")
        self.chat_template, self.train_on, self.on_bad = chat_template, train_on, on_bad
        self.metric, self.metrics, self.weight_column = metric, [metric], weight_column
        self.on_lost, self.chat_template_kwargs = on_lost, dict(chat_template_kwargs)
        shared = {
            "format": format,
            "columns": columns,
            "system": system,
            "split": "train",
            "eval_path": None,
            "eval_split": "test",
            "limit": None,
            "eval_fraction": eval_fraction,
            "eval_limit": eval_limit,
            "chat_template": chat_template,
            "train_on": train_on,
            "metric": metric,
            "streaming": False,
            "shuffle_block": 1,
            "on_bad": on_bad,
            "on_lost": on_lost,
            "weight_column": weight_column,
            "chat_template_kwargs": {},
        }
        self.parts: dict[str, tuple[SFT, float]] = {
            name: _part(f"task.parts.{name}", settings, shared) for name, settings in parts.items()
        }
        further = {"weight_column": None, "eval_fraction": 0, "split": "test", "limit": eval_limit}
        self.further: dict[str, SFT] = {
            name: _part(f"task.eval_sets.{name}", settings, shared | further)[0]
            for name, settings in sources.named_sets(eval_sets).items()
        }
        self.eval_sets = list(self.further)

    def examples(self, split: str) -> Iterator[Conversation | Bad]:
        if split.startswith("eval/"):
            yield from self.further[split.removeprefix("eval/")].examples("train")
            return
        for name, (part, weight) in self.parts.items():
            for index, example in enumerate(part.examples(split)):
                yield from itertools.repeat(
                    example, times(name, index, weight) if split == "train" else 1
                )

    def fingerprint(self, split: str) -> str:
        if split.startswith("eval/"):
            return self.further[split.removeprefix("eval/")].fingerprint("train")
        weights = (
            {name: weight for name, (_, weight) in self.parts.items()} if split == "train" else {}
        )
        return (
            f"{[(name, part.fingerprint(split)) for name, (part, _) in self.parts.items()]}"
            f" {weights}"
        )

    def grade(self, example: Conversation, completion: str) -> dict[str, float]:
        return {self.metric: score(self.metric, completion, example.reference)}


def _part(key: str, settings: Any, shared: dict[str, Any]) -> tuple[SFT, float]:
    """Return a part's rows and weight. `settings` override the `shared` arguments of SFT."""
    if not isinstance(settings, dict) or "path" not in settings or settings.keys() - KEYS:
        raise DataError(
            f"{key} is {settings!r}, expected a mapping with path and, optionally,"
            f" {', '.join(sorted(KEYS - {'path'}))}"
        )
    weight = settings.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1000:
        raise DataError(
            f"{key}.weight is {weight!r}, expected a number above 0 and below 1000: how often an"
            " epoch sees each row"
        )
    arguments = shared | {name: value for name, value in settings.items() if name != "weight"}
    try:
        return SFT(**arguments), float(weight)
    except DataError as error:
        raise DataError(f"{key}: {error}") from None


def times(part: str, index: int, weight: float) -> int:
    """Return how often an epoch sees the row with number `index`: the integer part of the weight,
    and once more by a fixed draw whose probability is the fractional part."""
    return int(weight) + (random.Random(f"{part} {index}").random() < weight % 1)
