"""The order in which callbacks act at the end of a step."""

from __future__ import annotations

from typing import Any

import lightning

from trainer.callbacks.averaging import Averaging
from trainer.callbacks.checkpoints import Checkpoints
from trainer.callbacks.cooldown import CooldownTrigger
from trainer.callbacks.evaluation import Evaluation
from trainer.callbacks.metrics import Metrics
from trainer.callbacks.progress import ProgressBar
from trainer.callbacks.rollback import Rollback
from trainer.callbacks.stopping import Stopping


class EndOfStep(lightning.Callback):
    """Calls the run's callbacks at the end of each optimiser step, and at the end of training.
    Lightning calls its hook after each micro-batch; only the last of an accumulation window ends a
    step."""

    def __init__(
        self,
        metrics: Metrics,
        stopping: Stopping,
        evaluation: Evaluation | None = None,
        averaging: Averaging | None = None,
        cooldown: CooldownTrigger | None = None,
        checkpoints: Checkpoints | None = None,
        progress: ProgressBar | None = None,
        rollback: Rollback | None = None,
    ):
        self.metrics, self.stopping, self.evaluation = metrics, stopping, evaluation
        self.averaging, self.cooldown = averaging, cooldown
        self.checkpoints, self.progress, self.rollback = checkpoints, progress, rollback

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.progress is not None:
            self.progress.count(module, batch_idx, trainer.accumulate_grad_batches)
        if not module.step_done:
            return
        best = False
        self.metrics.record(trainer, module)
        if self.rollback is not None:  # first: it may end the fit, and a bad step must not be saved
            self.rollback.check(module)
        if self.evaluation is not None:
            if self.evaluation.due(module.step):  # false if this step ends the run
                module.settle()
            best = self.evaluation.evaluate_if_due(trainer, module)
        if self.averaging is not None:  # after the evaluation of the weights themselves
            self.averaging.after_step(trainer, module)
        if self.cooldown is not None:  # reads the evaluation, and may end the run
            self.cooldown.check(trainer, module)
        self.stopping.check(trainer, module)
        if self.checkpoints is not None:  # last: a checkpoint holds the state of the others
            self.checkpoints.save_if_due(trainer, module, best)
        if self.progress is not None:
            self.progress.update(trainer, module)

    def on_train_end(self, trainer: lightning.Trainer, module: Any) -> None:
        best = False
        module.settle()
        if self.evaluation is not None:
            best = self.evaluation.evaluate_last(trainer, module)
        if self.averaging is not None:
            self.averaging.evaluate_last(trainer, module)
        self.stopping.check_data(module)
        if self.checkpoints is not None:
            self.checkpoints.save_last(trainer, module, best)
