"""A cooldown that begins when something says so, and not at a step that was planned."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import lightning
import torch

from trainer.callbacks import Context
from trainer.cluster import slurm_job
from trainer.schedules import factor
from trainer.schedules.cooldown import RuntimeCooldown

log = logging.getLogger("trainer")

SAFETY = 1.1  # steps may get slower by so much until the deadline


class CooldownTrigger(lightning.Callback):
    """Starts the cooldown after `patience` evaluations without a better one, in time for
    `deadline`, when the file RUN/cooldown appears or when SIGUSR2 comes; the run ends where it
    ends.

    A cooldown of `length` below 1 makes up that fraction f of all steps then: f / (1 - f) of those
    done. Its start and length are frozen when it begins and stand in the checkpoint, so that rates
    stay a function of the step alone.
    """

    def __init__(
        self,
        context: Context,
        length: float,
        shape: str,
        final: float,
        patience: int | None,
        deadline: str | None,
        reserve: float,
    ):
        self.context, self.length, self.shape, self.final = context, length, shape, final
        self.patience, self.deadline, self.reserve = patience, deadline, reserve
        self.file = context.folder.path / "cooldown"
        self.asked = False  # by the signal
        # evaluations without a better one that a cooldown which was left out has answered
        self.passed = 0
        self.began, self.steps_before = 0.0, 0
        self.job_ends: float | None = None

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self.context.signals.cool = self._ask
        end = slurm_job.end_time() if self.deadline == "slurm" and trainer.is_global_zero else None
        # From here on by a clock that nobody sets.
        self.job_ends = None if end is None else time.monotonic() + end - time.time()
        self.began, self.steps_before = time.monotonic(), module.step
        if module.cooling is not None:
            self.context.constant_until = None  # a planned cooldown does not begin within this one
        if module.drop_cooldown:
            self.passed = self.context.without  # what the left out cooldown was the answer to

    def _ask(self) -> None:
        self.asked = True

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not module.step_done:
            return
        if module.cooling is not None:
            if (
                module.step >= module.cooling.start + module.cooling.steps
                and module.step < self.context.steps
            ):
                self.context.stopped = f"cooled down over {module.cooling.steps} steps"
            return
        steps, reason = self._due(module.step)
        # the first process decides, since only one clock and one disk count
        if trainer.world_size > 1:
            told = torch.tensor([steps if trainer.is_global_zero else 0], device=module.device)
            steps = int(trainer.strategy.reduce(told, reduce_op="max")[0])
        if steps:
            self._begin(module, steps, reason)

    def _due(self, step: int) -> tuple[int, str]:
        """(steps of the cooldown that begins now, why); 0 if none does."""
        wanted = (
            round(step * self.length / (1 - self.length)) if self.length < 1 else round(self.length)
        )
        wanted = min(max(1, wanted), self.context.steps - step)
        self.passed = min(self.passed, self.context.without)
        if self.asked:
            return wanted, "SIGUSR2 was received"
        if self.file.exists():
            return wanted, f"{self.file} was found"
        if self.patience is not None and self.context.without - self.passed >= self.patience:
            return wanted, f"no better evaluation in {self.patience}"
        left = self._seconds_left()
        if left is not None:
            each = SAFETY * (time.monotonic() - self.began) / (step - self.steps_before)
            if left <= wanted * each:
                return (
                    max(1, min(wanted, int(left / each))),
                    f"{left / 60:.1f} minutes are left until the deadline",
                )
        return 0, ""

    def _seconds_left(self) -> float | None:
        """Until the deadline, without what is reserved for the end."""
        if self.deadline == "max_time" and self.context.max_minutes is not None:
            return 60 * (self.context.max_minutes - self.context.minutes - self.reserve)
        if self.job_ends is not None:
            return self.job_ends - time.monotonic() - 60 * self.reserve
        return None

    def _begin(self, module: Any, steps: int, reason: str) -> None:
        if self.context.constant_until is not None and module.step >= self.context.constant_until:
            return  # the schedule's own has begun
        self.context.constant_until = module.step
        level = factor(module.schedule, module.step, module.steps, module.adapter.restart)
        module.cooling = RuntimeCooldown(module.step, steps, level, self.shape, self.final)
        log.info(
            "the rate cools down over the next %d steps: %s",
            steps,
            reason or "the first process said so",
        )
        self.context.journal.write(
            "cooldown", module.step, {"reason": reason, "steps": steps, "level": level}
        )
        if self.context.journal.writes:
            _put_away(self.file)


def _put_away(file: Path) -> None:
    """Rename the user's file, so that a run that is made longer does not find it again."""
    if file.exists():
        file.replace(file.with_name(file.name + ".done"))
