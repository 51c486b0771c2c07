"""A cooldown that begins at run time, and not at a planned step."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import lightning
import torch

from trainer.callbacks import RunState
from trainer.cluster import slurm_job
from trainer.schedules import factor
from trainer.schedules.cooldown import RuntimeCooldown

log = logging.getLogger("trainer")

SAFETY = 1.1  # steps may become 10 % slower before the deadline


class CooldownTrigger(lightning.Callback):
    """Starts the cooldown after `patience` evaluations without a better one, in time for
    `deadline`, when the file RUN/cooldown appears, or on SIGUSR2. The run ends with the cooldown.

    A `length` f below 1 is a fraction of all steps, the cooldown included: f / (1 - f) of the steps
    before it. Start and length are fixed when it begins and saved in the checkpoint, so rates
    remain a function of the step alone.
    """

    def __init__(
        self,
        run_state: RunState,
        length: float,
        shape: str,
        final: float,
        patience: int | None,
        deadline: str | None,
        reserve: float,
    ):
        self.run_state, self.length, self.shape, self.final = run_state, length, shape, final
        self.patience, self.deadline, self.reserve = patience, deadline, reserve
        self.file = run_state.folder.path / "cooldown"
        self.requested = False  # by the signal
        # evaluations without a better one before a cooldown that this extended run leaves out
        self.evals_before = 0
        self.train_start, self.steps_before = 0.0, 0
        self.job_ends: float | None = None

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self.run_state.signals.cool = self._request
        end = slurm_job.end_time() if self.deadline == "slurm" and trainer.is_global_zero else None
        # converted to the monotonic clock: the wall clock may be set while the run trains
        self.job_ends = None if end is None else time.monotonic() + end - time.time()
        self.train_start, self.steps_before = time.monotonic(), module.step
        if module.runtime_cooldown is not None:
            # a planned cooldown does not begin within this one
            self.run_state.constant_until = None
        if module.drop_cooldown:
            self.evals_before = self.run_state.evals_since_best

    def _request(self) -> None:
        self.requested = True

    def check(self, trainer: lightning.Trainer, module: Any) -> None:
        """Begin the cooldown if there is a reason. Stop the run at the end of the cooldown."""
        if module.runtime_cooldown is not None:
            if (
                module.step >= module.runtime_cooldown.start + module.runtime_cooldown.steps
                and module.step < self.run_state.steps
            ):
                self.run_state.stopped = f"cooled down over {module.runtime_cooldown.steps} steps"
            return
        steps, reason = self._due(module.step)
        # rank 0 decides: the ranks' clocks and disks may differ
        if trainer.world_size > 1:
            decision = torch.tensor([steps if trainer.is_global_zero else 0], device=module.device)
            steps = int(trainer.strategy.reduce(decision, reduce_op="max")[0])
        if steps:
            self._begin(module, steps, reason)

    def _due(self, step: int) -> tuple[int, str]:
        """Return (steps of the cooldown that begins now, the reason); 0 steps if none begins."""
        cooldown_steps = (
            round(step * self.length / (1 - self.length)) if self.length < 1 else round(self.length)
        )
        cooldown_steps = min(max(1, cooldown_steps), self.run_state.steps - step)
        self.evals_before = min(self.evals_before, self.run_state.evals_since_best)
        if self.requested:
            return cooldown_steps, "SIGUSR2 was received"
        if self.file.exists():
            return cooldown_steps, f"{self.file} was found"
        if (
            self.patience is not None
            and self.run_state.evals_since_best - self.evals_before >= self.patience
        ):
            return cooldown_steps, f"no better evaluation in {self.patience}"
        seconds_left = self._seconds_left()
        if seconds_left is not None:
            train_seconds = time.monotonic() - self.train_start
            step_seconds = SAFETY * train_seconds / (step - self.steps_before)
            if seconds_left <= cooldown_steps * step_seconds:
                return (
                    max(1, min(cooldown_steps, int(seconds_left / step_seconds))),
                    f"{seconds_left / 60:.1f} minutes are left until the deadline",
                )
        return 0, ""

    def _seconds_left(self) -> float | None:
        """Return the seconds until the deadline, less `reserve`; None without a deadline."""
        if self.deadline == "max_time" and self.run_state.max_minutes is not None:
            return 60 * (self.run_state.max_minutes - self.run_state.minutes - self.reserve)
        if self.job_ends is not None:
            return self.job_ends - time.monotonic() - 60 * self.reserve
        return None

    def _begin(self, module: Any, steps: int, reason: str) -> None:
        if (
            self.run_state.constant_until is not None
            and module.step >= self.run_state.constant_until
        ):
            return  # the schedule's cooldown has begun
        self.run_state.constant_until = module.step
        level = factor(module.schedule, module.step, module.steps, module.adapter.restart)
        module.runtime_cooldown = RuntimeCooldown(module.step, steps, level, self.shape, self.final)
        log.info(
            "the rate cools down over the next %d steps: %s",
            steps,
            reason or "decided by rank 0",
        )
        self.run_state.journal.write(
            "cooldown", module.step, {"reason": reason, "steps": steps, "level": level}
        )
        if self.run_state.journal.writes:
            _mark_done(self.file)


def _mark_done(file: Path) -> None:
    """Rename the user's file, so that an extended run does not act on it again."""
    if file.exists():
        file.replace(file.with_name(file.name + ".done"))
