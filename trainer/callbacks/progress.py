"""The progress of training: a bar on a terminal, a line every 15 seconds elsewhere. A step that
takes longer has lines within it."""

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

from trainer.callbacks import RunState
from trainer.models.flops import Work
from trainer.storage import progress
from trainer.storage.progress import EVERY, clock

log = logging.getLogger(__name__)

UNLIMITED = 1 << 40  # more steps than any run has


class ProgressBar(lightning.Callback):
    """Shows loss, rate, processed and trained tokens/s, and the time left."""

    def __init__(self, run_state: RunState, every: int):
        self.run_state, self.every = run_state, every
        self.bar: Progress | None = None
        self.ticks: progress.Progress | None = None
        self.logged = self.train_start = 0.0
        self.first_step = 0

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self.train_start, self.first_step = time.monotonic(), module.step
        if not trainer.is_global_zero:
            return
        if not get_console().is_terminal:
            self.ticks = progress.Progress("training", self._total(), "steps", module.step)
            self.ticks.__enter__()
            return
        time_left = [TextColumn("left"), TimeRemainingColumn()] if self._total() is not None else []
        self.bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn() if time_left else TextColumn("{task.completed:.0f}"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            *time_left,
            console=get_console(),
        )
        self.task = self.bar.add_task("", total=self._total(), completed=module.step)
        self.bar.start()

    def count(self, module: Any, batch: int, accumulate: int) -> None:
        """Count a micro-batch, and with the last one its step."""
        if self.ticks is not None and module.step_done:
            self.ticks.advance(module.step - self.ticks.done)
        elif self.ticks is not None:
            self.ticks.within(batch % accumulate + 1, accumulate, "micro-batches")

    def update(self, trainer: lightning.Trainer, module: Any) -> None:
        """Show the current step, or log it if there is no bar."""
        # the newest step whose numbers were read
        step = module.step - (getattr(module, "unread", None) is not None)
        if step % self.every or not step or not trainer.is_global_zero:
            return
        row = self.run_state.journal.last
        loss = math.nan if row.get("loss") is None else row["loss"]
        text = (
            f"loss {loss:.4f}  lr {row['lr']:.2e}  {row['tokens_per_s']:,.0f} tokens/s"
            f" ({row['trained_per_s']:,.0f} trained){_of_peak(trainer, module, row)}"
            if row
            else ""
        )
        if self.bar is not None:
            if self._total() is None and (left := self._left(0.0, step)) is not None:
                text = f"{text}  left {clock(left)}"  # the bar's own column needs a number of steps
            self.bar.update(self.task, completed=step, description=text)
        elif time.monotonic() - self.logged > EVERY or step >= self.run_state.steps:
            self.logged = time.monotonic()
            if self.ticks is not None:
                self.ticks.spoke = self.logged
            done = step - self.first_step
            left = self._left((time.monotonic() - self.train_start) / max(1, done), step)
            log.info(
                "step %d%s  %s%s",
                step,
                of(self.run_state.steps, "/"),
                text,
                "" if left is None else f"  left {clock(left)}",
            )

    def _left(self, step_seconds: float, step: int) -> float | None:
        """Return the seconds until the last planned step or max_time, whichever is first; None if
        neither is known."""
        limits = []
        if self._total() is not None:
            limits.append(step_seconds * (self.run_state.steps - step))
        if self.run_state.max_minutes is not None:
            limits.append(max(0.0, 60 * (self.run_state.max_minutes - self.run_state.minutes)))
        return min(limits, default=None)

    def _total(self) -> int | None:
        """Return the planned steps; None if only the time limits them."""
        return planned(self.run_state.steps)

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
        if self.ticks is not None:
            self.ticks.__exit__()
            self.ticks = None


def _of_peak(trainer: lightning.Trainer, module: Any, row: dict[str, Any]) -> str:
    """Return the operations a second, and their part of what the devices reach at most, as text;
    empty for a module without a formula."""
    work: Work | None = getattr(module, "work", None)
    if work is None:
        return ""
    rate = work.rate(row["tokens_per_s"], row["trained_per_s"])
    return f"  {rate / 1e12:.3g} TFLOP/s, {rate / work.peak / trainer.world_size:.0%} of peak"


def planned(steps: int) -> int | None:
    """Return the planned steps; None if their number is unknown, as with max_time alone."""
    return steps if steps < UNLIMITED else None


def of(steps: int, word: str = " of ") -> str:
    """Return `word` and the planned steps; empty if their number is unknown."""
    return f"{word}{steps}" if steps < UNLIMITED else ""
