"""Reasons to stop before the planned steps are done: a signal, or the time."""

from __future__ import annotations

import signal
import time
from typing import Any

import lightning
import torch

from trainer.callbacks import RunState


class Stopping(lightning.Callback):
    """Stops a run on a signal, at a limit, or for the reason in RunState.stopped."""

    def __init__(self, run_state: RunState):
        self.run_state = run_state
        self.minutes = 0.0  # of training, over all starts of the run
        self.since = 0.0

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self.run_state.signals.install()
        self.run_state.signals.deferred = True
        self.since = time.monotonic()

    def check(self, trainer: lightning.Trainer, module: Any) -> None:
        """Stop the run after the current step, if there is a reason, on all ranks together."""
        now = time.monotonic()
        self.minutes += (now - self.since) / 60
        self.run_state.minutes = self.minutes
        self.since = now
        received = self.run_state.signals.received or 0
        over = self.run_state.max_minutes is not None and self.minutes >= self.run_state.max_minutes
        if trainer.world_size > 1:
            flags = torch.tensor([received, int(over)], device=module.device)
            received, over = trainer.strategy.reduce(flags, reduce_op="max").tolist()
        if received:
            self.run_state.signals.received = int(received)
            self.run_state.stopped = f"{signal.Signals(int(received)).name} was received"
        elif over:
            self.run_state.stopped = f"max_time={self.run_state.max_minutes:g} minutes have passed"
        elif (
            self.run_state.max_tokens is not None
            and module.tokens >= self.run_state.max_tokens
            and module.step < self.run_state.steps
        ):
            self.run_state.stopped = f"max_tokens={self.run_state.max_tokens} are processed"
        if self.run_state.stopped is not None and not trainer.should_stop:
            trainer.should_stop = True
            if not received:
                limits = {
                    "minutes": self.minutes,
                    "steps": self.run_state.steps,
                    "max_time": self.run_state.max_minutes,
                }
                self.run_state.journal.write(
                    "stopped", module.step, {"reason": self.run_state.stopped, **limits}
                )

    def check_data(self, module: Any) -> None:
        """Set the reason of a run whose data ended before its planned steps, as a stream may."""
        if self.run_state.stopped is None and module.step < self.run_state.steps:
            self.run_state.stopped = "the data came to its end"
            self.run_state.journal.write(
                "stopped", module.step, {"reason": self.run_state.stopped, "minutes": self.minutes}
            )

    def state_dict(self) -> dict[str, Any]:
        return {"minutes": self.minutes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.minutes = self.run_state.minutes = state_dict["minutes"]
