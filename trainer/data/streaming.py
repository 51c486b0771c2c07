"""Rows that are read while training, for data that is too large to be tokenised first.

Batches are still a function of the seed and the step: rows come in blocks of `shuffle_block`, block
k is shuffled by (seed, k), and a resumed run reads the stream again up to where it stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from tasks.reading import DataError
from trainer.data.batches import Collate, Pick
from trainer.data.lengths import Report, take
from trainer.data.render import Renderer, Tokens
from trainer.data.rendering import rendered

log = logging.getLogger("trainer")


class StreamingBatches(IterableDataset):
    """Collated micro-batches of steps `start` to `steps` for one rank. Every step has `accumulate`
    of them."""

    def __init__(
        self,
        task: Any,
        renderer: Renderer,
        collate: Collate,
        config: dict[str, Any],
        steps: int,
        start: int,
        rank: int,
        ranks: int,
    ):
        self.task, self.renderer, self.collate, self.config = task, renderer, collate, config
        self.steps, self.start, self.rank, self.ranks = steps, start, rank, ranks
        self.report = Report()
        self.noted: set[str] = set()

    def __len__(self) -> int:
        return self.steps * self.config["accumulate"]

    def rows(self) -> Iterator[tuple[str, Tokens]]:
        """Yield (where, row) in training order, epoch after epoch.

        Raises:
            DataError: a row is broken and on_bad=raise, a row is too long and overlong=raise, or
                no row is usable.
        """
        epochs = self.config["max_epochs"]
        epoch = block = 0
        pending: list[tuple[str, Tokens]] = []
        while epochs is None or epoch < epochs:
            rows_before = self.report.kept
            for where, outcome in rendered(self.task.examples("train"), self.renderer, 1):
                self.report.rows += 1
                settings = self.config["max_length"], self.config["overlong"], self.task.on_bad
                rows = take(where, outcome, self.renderer, *settings, self.report)
                if isinstance(outcome, str) and self.task.on_bad == "raise":
                    raise DataError(f"{where}: {outcome}\nFix it, or skip it with task.on_bad=skip")
                self._note(where)
                for row in rows:
                    pending.append((where, row))
                    if len(pending) == self.task.shuffle_block:
                        yield from self._shuffled(pending, block)
                        pending, block = [], block + 1
            if self.report.kept == rows_before:
                raise DataError(f"no row of the stream is usable: {self.report.summary()}")
            epoch += 1
        yield from self._shuffled(pending, block)

    def _note(self, where: str) -> None:
        """Log the first time that something of a row does not reach the model."""
        for kind in ("lost", "unread"):
            for name in getattr(self.report, kind).keys() - self.noted:
                self.noted.add(name)
                what = "the chat template leaves out" if kind == "lost" else "nothing reads"
                log.warning("%s: %s %s; further rows like it are not reported", where, what, name)

    def _shuffled(self, rows: list[tuple[str, Tokens]], block: int) -> Iterator[tuple[str, Tokens]]:
        for index in np.random.default_rng([self.config["seed"], block]).permutation(len(rows)):
            yield rows[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.start >= self.steps:
            return
        size = self.config["batch_size"]
        per_step = size * self.config["accumulate"] * self.ranks
        window: list[tuple[str, Tokens]] = []
        step = 0
        for item in self.rows():
            window.append(item)
            if len(window) == per_step:
                if step >= self.start:
                    yield from self._micro_batches(window, per_step)
                window, step = [], step + 1
                if step == self.steps:
                    return
        if window and step >= self.start:
            yield from self._micro_batches(window, per_step)

    def _micro_batches(
        self, window: list[tuple[str, Tokens]], per_step: int
    ) -> Iterator[dict[str, Any]]:
        labelled = self.collate.labelled
        trained = sum(1 if labelled else _weighted(row) for _, row in window)
        size = self.config["batch_size"]
        # The stream's last step may be smaller. Fillers, which train nothing, complete it.
        filled = [(*item, True) for item in window] + [(*window[0], False)] * (
            per_step - len(window)
        )
        for first in range(self.rank * size, per_step, size * self.ranks):
            share = filled[first : first + size]
            batch = self.collate([(Pick(-1, trains, trained), [row]) for _, row, trains in share])
            yield batch | {"sequences": [where for where, _, _ in share]}


def _weighted(row: Tokens) -> float:
    """Return the trained tokens of a row times its weight."""
    trained = sum(row.trained[1:])
    return trained if row.weight == 1.0 else trained * row.weight
