"""What a person sees while a run goes on: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import lightning
from rich import get_console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from trainer.callbacks import Context
from trainer.storage.progress import EVERY, clock

log = logging.getLogger(__name__)

UNLIMITED = 1 << 40  # steps that no run comes to


class ProgressBar(lightning.Callback):
    """Loss, rate, processed and trained tokens/s, and the time left."""

    def __init__(self, context: Context, every: int):
        self.context, self.every = context, every
        self.bar: Progress | None = None
        self.said = self.began = 0.0
        self.first_step = 0

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self.began, self.first_step = time.monotonic(), module.step
        if not trainer.is_global_zero or not get_console().is_terminal:
            return
        known = [TextColumn("left"), TimeRemainingColumn()] if self._total() is not None else []
        self.bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn() if known else TextColumn("{task.completed:.0f}"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            *known,
            console=get_console(),
        )
        self.task = self.bar.add_task("", total=self._total(), completed=module.step)
        self.bar.start()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not module.step_done or module.step % self.every or not trainer.is_global_zero:
            return
        row = self.context.journal.last
        loss = math.nan if row.get("loss") is None else row["loss"]
        text = (
            f"loss {loss:.4f}  lr {row['lr']:.2e}  {row['tokens_per_s']:,.0f} tokens/s"
            f" ({row['trained_per_s']:,.0f} trained)"
            if row
            else ""
        )
        if self.bar is not None:
            if self._total() is None and (left := self._left(0.0, module.step)) is not None:
                text = f"{text}  left {clock(left)}"  # the bar's own column needs a number of steps
            self.bar.update(self.task, completed=module.step, description=text)
        elif time.monotonic() - self.said > EVERY or module.step >= self.context.steps:
            self.said = time.monotonic()
            done = module.step - self.first_step
            left = self._left((time.monotonic() - self.began) / max(1, done), module.step)
            log.info(
                "step %d%s  %s%s",
                module.step,
                of(self.context.steps, "/"),
                text,
                "" if left is None else f"  left {clock(left)}",
            )

    def _left(self, step_seconds: float, step: int) -> float | None:
        """Seconds until the planned steps or the time are used up, whichever is first; None where
        nothing known limits the run."""
        limits = []
        if self._total() is not None:
            limits.append(step_seconds * (self.context.steps - step))
        if self.context.max_minutes is not None:
            limits.append(max(0.0, 60 * (self.context.max_minutes - self.context.minutes)))
        return min(limits, default=None)

    def _total(self) -> int | None:
        """The planned steps; None where only the time limits them."""
        return planned(self.context.steps)

    def on_train_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self._close()

    def on_exception(
        self, trainer: lightning.Trainer, module: Any, exception: BaseException
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def planned(steps: int) -> int | None:
    """The planned steps; None where there is no number of them, as with max_time alone."""
    return steps if steps < UNLIMITED else None


def of(steps: int, word: str = " of ") -> str:
    """`word` and the planned steps; nothing where there is no number of them."""
    return f"{word}{steps}" if steps < UNLIMITED else ""
