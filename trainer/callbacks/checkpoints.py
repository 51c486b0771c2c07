"""Times to save a run, and the checkpoints that are kept."""

from __future__ import annotations

import json
import time
from typing import Any

import lightning

from trainer.callbacks import RunState, every_steps, stop_requested
from trainer.storage import atomic, checkpoints


class Checkpoints(lightning.Callback):
    """Saves every `every` steps, at the best evaluation, before a cooldown, at the end and when a
    signal stops the run. Keeps the `keep` newest, the best and the one before the cooldown. Saves
    only at the end of a step: the gradients of an accumulation window are in no checkpoint."""

    def __init__(self, run_state: RunState, every: float | None, keep: int | None):
        self.run_state, self.every, self.keep = run_state, every_steps(every, run_state.steps), keep
        self.saved: int | None = None

    def on_fit_start(self, trainer: lightning.Trainer, module: Any) -> None:
        if trainer.is_global_zero:
            checkpoints.remove_leftovers(self.run_state.folder.checkpoints)

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self.saved = module.step or None

    def save_if_due(self, trainer: lightning.Trainer, module: Any, best: bool) -> None:
        """Save after the current step, if one of the reasons applies. `best` marks it as the best
        so far."""
        due = self.every is not None and module.step % self.every == 0
        if self.run_state.doubtful:  # or bad steps would push the good ones out of `keep`
            due = best = False
        last = module.step >= self.run_state.steps or self.run_state.stopped is not None
        # With every=null a planned cooldown is no reason to save.
        constant = module.step == self.run_state.constant_until and (
            self.every is not None or module.runtime_cooldown is not None
        )
        if due or last or best or constant:
            self.save(trainer, module, best)

    def save_last(self, trainer: lightning.Trainer, module: Any, best: bool) -> None:
        """Save the last step of a run that ended before its planned steps."""
        if module.step_done and not stop_requested(trainer, module, self.run_state):
            # The last step of a stream is known only after it, when there is no next batch.
            self.save(trainer, module, best)

    def save(self, trainer: lightning.Trainer, module: Any, best: bool = False) -> None:
        """Save the current step, once."""
        if self.saved == module.step:
            return
        module.settle()  # so that the journal has this step, and its counts are right
        started = time.monotonic()
        folder = self.run_state.folder.checkpoints
        trainer.save_checkpoint(checkpoints.Checkpoint.at(folder, module.step).path)
        self.saved = module.step
        if trainer.is_global_zero:
            if best:
                atomic.write_text(folder / "best.json", json.dumps({"step": module.step}))
            if module.step == self.run_state.constant_until:
                atomic.write_text(folder / "constant.json", json.dumps({"step": module.step}))
            self._prune()
        self.run_state.paused_seconds += time.monotonic() - started

    def _prune(self) -> None:
        if self.keep is None:
            return
        folder = self.run_state.folder.checkpoints
        marked = [checkpoints.marked(folder, name) for name in checkpoints.MARKS]
        for checkpoint in checkpoints.complete(folder)[: -self.keep]:
            if checkpoint not in marked:
                checkpoints.remove(checkpoint)
