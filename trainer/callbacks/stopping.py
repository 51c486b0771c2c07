"""Reasons to stop before the planned steps are done: a signal, or the time."""

from __future__ import annotations

import signal
import time
from typing import Any

import lightning
import torch

from trainer.callbacks import Context


class Stopping(lightning.Callback):
    """Reads the signals' note where a step ends; all ranks agree on it."""

    def __init__(self, context: Context):
        self.context = context
        self.minutes = 0.0  # of training, over all starts of the run
        self.since = 0.0

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self.context.signals.install()
        self.context.signals.deferred = True
        self.since = time.monotonic()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not module.step_done:
            return
        now = time.monotonic()
        self.minutes += (now - self.since) / 60
        self.context.minutes = self.minutes
        self.since = now
        number = self.context.signals.received or 0
        over = self.context.max_minutes is not None and self.minutes >= self.context.max_minutes
        if trainer.world_size > 1:
            told = torch.tensor([number, int(over)], device=module.device)
            number, over = trainer.strategy.reduce(told, reduce_op="max").tolist()
        if number:
            self.context.signals.received = int(number)
            self.context.stopped = f"{signal.Signals(int(number)).name} was received"
        elif over:
            self.context.stopped = f"max_time={self.context.max_minutes:g} minutes have passed"
        elif (
            self.context.max_tokens is not None
            and module.tokens >= self.context.max_tokens
            and module.step < self.context.steps
        ):
            self.context.stopped = f"max_tokens={self.context.max_tokens} are processed"
        if self.context.stopped is not None and not trainer.should_stop:
            trainer.should_stop = True
            if not number:
                had = {
                    "minutes": self.minutes,
                    "steps": self.context.steps,
                    "max_time": self.context.max_minutes,
                }
                self.context.journal.write(
                    "stopped", module.step, {"reason": self.context.stopped, **had}
                )

    def on_train_end(self, trainer: lightning.Trainer, module: Any) -> None:
        # a stream came to its end
        if self.context.stopped is None and module.step < self.context.steps:
            self.context.stopped = "the data came to its end"
            self.context.journal.write(
                "stopped", module.step, {"reason": self.context.stopped, "minutes": self.minutes}
            )

    def state_dict(self) -> dict[str, Any]:
        return {"minutes": self.minutes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.minutes = self.context.minutes = state_dict["minutes"]
