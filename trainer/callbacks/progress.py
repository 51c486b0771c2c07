"""What a person sees while a run goes on: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import lightning
from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from trainer.callbacks import Context

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
        self.bar = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.description}"), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=get_console(),
        )  # fmt: skip
        self.task = self.bar.add_task("", total=self._total(), completed=module.step)
        self.bar.start()

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not module.step_done or module.step % self.every or not trainer.is_global_zero:
            return
        row = self.context.journal.last
        loss = math.nan if row.get("loss") is None else row["loss"]
        text = (
            f"loss {loss:.4f}  lr {row['lr']:.2e}  {row['tokens_per_s']:,.0f} tokens/s ({row['trained_per_s']:,.0f} trained)"
            if row
            else ""
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=module.step, description=text)
        elif time.monotonic() - self.said > 15 or module.step >= self.context.steps:
            self.said = time.monotonic()
            done = module.step - self.first_step
            left = (time.monotonic() - self.began) / max(1, done) * (self.context.steps - module.step)
            if self.context.max_minutes is not None:
                left = min(left, max(0.0, 60 * (self.context.max_minutes - self.context.minutes)))
            of = f"/{self.context.steps}" if self._total() is not None else ""
            log.info("step %d%s  %s  left %d:%02d", module.step, of, text, left // 60, left % 60)

    def _total(self) -> int | None:
        """The planned steps; None where only the time limits them."""
        return self.context.steps if self.context.steps < UNLIMITED else None

    def on_train_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self._close()

    def on_exception(self, trainer: lightning.Trainer, module: Any, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
