"""The numbers of each step, for the journal."""

from __future__ import annotations

import math
import time
from typing import Any

import lightning
import torch

from trainer.callbacks import RunState
from trainer.drafters import metrics
from trainer.models.losses import NonFinite


class Metrics(lightning.Callback):
    """Records loss, rate, gradient norm and throughput of every `every`-th step, the density if
    there is a penalty, and each skipped step with its rows."""

    def __init__(self, run_state: RunState, every: int):
        self.run_state, self.every = run_state, every
        self.last_time, self.last_processed = 0.0, 0
        # a tensor until a row is written: reading its value waits for the GPU
        self.last_trained: Any = 0
        self.seconds = 0.0  # of training, over all starts of the run

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self.last_time, self.run_state.paused_seconds = time.monotonic(), 0.0
        self.run_state.journal.tokens = module.tokens

    def record(self, trainer: lightning.Trainer, module: Any) -> None:
        """Write the journal's rows of the current step."""
        sums = module.sums
        self.run_state.journal.tokens = module.tokens
        self.last_processed += int(sums["processed"])
        self.last_trained = self.last_trained + sums["tokens"]
        if module.skipped_in_a_row:
            self._skipped(module)
        if module.smaller is not None:
            self.run_state.journal.write("memory", module.step, module.smaller)
        if module.news:
            self.run_state.journal.write("adapter", module.step, module.news)
        if module.step % self.every and module.step < self.run_state.steps:
            return
        now = time.monotonic()
        elapsed = max(now - self.last_time - self.run_state.paused_seconds, 1e-9)
        self.seconds += elapsed
        tokens = max(1, int(sums["tokens"]))
        row = {
            "loss": finite(float(sums["loss"]) / tokens),
            **({"accuracy": float(sums["right"]) / tokens} if "right" in sums else {}),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "grad_norm": finite(float(module.grad_norm)),
            **parts(trainer, module),
            "tokens": module.tokens,
            "skipped": module.skipped,
            "tokens_per_s": self.last_processed / elapsed,
            "trained_per_s": int(self.last_trained) / elapsed,
            "seconds": self.seconds,
        }
        if module.density is not None:
            row["density"] = module.density
        if "offsets" in sums:
            row |= metrics(sums["offsets"])
        if torch.cuda.is_available():
            row["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self.run_state.journal.write("step", module.step, row)
        if module.densities and module.step % max(self.every, self.run_state.steps // 100) == 0:
            self.run_state.journal.write("density", module.step, module.densities)
        self.last_processed = self.last_trained = 0
        self.last_time, self.run_state.paused_seconds = now, 0.0

    def _skipped(self, module: Any) -> None:
        # JSON has no NaN, so these two are text.
        values = {
            "loss": str(float(module.sums["loss"])),
            "grad_norm": str(float(module.grad_norm)),
        }
        self.run_state.journal.write(
            "skipped",
            module.step,
            values | {"rows": self.run_state.rows_of(module.sums["sequences"])},
        )

    def on_exception(
        self, trainer: lightning.Trainer, module: Any, exception: BaseException
    ) -> None:
        raised_before_end_of_step = isinstance(exception, NonFinite) and module.skipped_in_a_row
        if raised_before_end_of_step:
            self._skipped(module)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]


def parts(trainer: lightning.Trainer, module: Any) -> dict[str, float | None]:
    """Return rate and gradient norm of each part of an adapter that has several, such as RoSA's."""
    if len(module.parts) < 2:
        return {}
    groups = trainer.optimizers[0].param_groups
    rates = {f"lr/{part}": groups[number]["lr"] for part, number in module.group_of.items()}
    norms = {f"grad_norm/{part}": finite(float(n)) for part, n in module.part_norms.items()}
    return rates | norms


def finite(value: float) -> float | None:
    """Return the value, or None if it is NaN or infinite, which JSON cannot represent."""
    return value if math.isfinite(value) else None
