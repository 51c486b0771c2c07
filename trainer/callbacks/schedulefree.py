"""Switches the weights between the two points of a schedule-free optimiser (Defazio et al. 2024,
arXiv 2405.15682).

    y = (1 - β) z + β x          z the last step, x the average, β = betas[0]

The library's optimiser holds x in its evaluation mode, and y in its training mode.
"""

from __future__ import annotations

from typing import Any

import lightning


class ScheduleFree(lightning.Callback):
    """Puts y into the weights while a step computes gradients, and x at all other times. Callbacks
    after this one evaluate and save x.

    It switches in each step, not only before evaluations and saves. So these change no bits, and a
    resumed run has the same bits as an uninterrupted one. Each switch is one lerp, which rounds
    once, as the update itself does.
    """

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: Any, batch: Any, batch_idx: int
    ) -> None:
        optimizer: Any = trainer.optimizers[0]
        optimizer.train()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        optimizer: Any = trainer.optimizers[0]
        if module.step_done:
            optimizer.eval()
