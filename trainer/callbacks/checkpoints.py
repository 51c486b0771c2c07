"""When a run is saved, and which checkpoints stay."""

from __future__ import annotations

import json
import time
from typing import Any

import lightning

from trainer.callbacks import Context, every_steps, stop_requested
from trainer.storage import atomic, checkpoints


class Checkpoints(lightning.Callback):
    """Saves every `every` steps, at the best evaluation, before a cooldown, at the end and when the
    run is told to stop; keeps the `keep` newest, the best and the one before the cooldown. Only
    where a step ends: the middle of an accumulation window has gradients that no file holds."""

    def __init__(self, context: Context, every: float | None, keep: int | None):
        self.context, self.every, self.keep = context, every_steps(every, context.steps), keep
        self.saved: int | None = None

    def on_fit_start(self, trainer: lightning.Trainer, module: Any) -> None:
        if trainer.is_global_zero:
            checkpoints.remove_leftovers(self.context.folder.checkpoints)

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self.saved = module.step or None

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not module.step_done:
            return
        due = self.every is not None and module.step % self.every == 0
        last = module.step >= self.context.steps or self.context.stopped is not None
        # With every=null a cooldown that was planned keeps none of its own.
        constant = module.step == self.context.constant_until and (
            self.every is not None or module.cooling is not None
        )
        if due or last or self.context.improved or constant:
            self.save(trainer, module)

    def on_train_end(self, trainer: lightning.Trainer, module: Any) -> None:
        if module.step_done and not stop_requested(trainer, module, self.context):
            # a stream's last step is known only when nothing comes after it
            self.save(trainer, module)

    def save(self, trainer: lightning.Trainer, module: Any) -> None:
        """Save the step at hand, once."""
        if self.saved == module.step:
            return
        started = time.monotonic()
        folder = self.context.folder.checkpoints
        trainer.save_checkpoint(checkpoints.Checkpoint.at(folder, module.step).path)
        self.saved = module.step
        if trainer.is_global_zero:
            if self.context.improved:
                atomic.write_text(folder / "best.json", json.dumps({"step": module.step}))
            if module.step == self.context.constant_until:
                atomic.write_text(folder / "constant.json", json.dumps({"step": module.step}))
            self._prune()
        self.context.paused += time.monotonic() - started

    def _prune(self) -> None:
        if self.keep is None:
            return
        folder = self.context.folder.checkpoints
        kept = [checkpoints.marked(folder, name) for name in ("best", "constant")]
        for checkpoint in checkpoints.complete(folder)[: -self.keep]:
            if checkpoint not in kept:
                checkpoints.remove(checkpoint)
