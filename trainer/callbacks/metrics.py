"""The numbers of each step, for the journal."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, field
from typing import Any

import lightning
import torch

from trainer.callbacks import RunState
from trainer.drafters import metrics
from trainer.models.losses import NonFinite
from trainer.training.late import Copy


@dataclass
class Row:
    """A step's numbers. Without `rates` it has no row of its own in the journal."""

    step: int
    tokens: int  # processed so far
    numbers: Copy
    sequences: list[Any]
    smaller: dict[str, Any] | None = None
    news: dict[str, float] = field(default_factory=dict)
    rates: dict[str, float] | None = None
    density: float | None = None
    densities: dict[str, float] = field(default_factory=dict)
    memory: float | None = None  # GB
    processed: int = 0  # tokens since the last row
    elapsed: float = 1.0  # seconds of training since the last row
    seconds: float = 0.0

    def values(self, numbers: dict[str, Any], skipped: int) -> dict[str, Any]:
        """Return the journal's row, from the numbers that were read."""
        tokens, rates = max(1, int(numbers["tokens"])), dict(self.rates or {})
        row = {
            "loss": finite(float(numbers["loss"]) / tokens),
            **({"accuracy": float(numbers["right"]) / tokens} if "right" in numbers else {}),
            "lr": rates.pop("lr"),
            "grad_norm": finite(float(numbers["grad_norm"])),
            **rates,
            **{f"grad_norm/{part}": finite(float(n)) for part, n in numbers["norms"].items()},
            "tokens": self.tokens,
            "skipped": skipped,
            "tokens_per_s": self.processed / self.elapsed,
            "trained_per_s": int(numbers["trained"]) / self.elapsed,
            "seconds": self.seconds,
        }
        if self.density is not None:
            row["density"] = self.density
        if "offsets" in numbers:
            row |= metrics(numbers["offsets"])
        if self.memory is not None:
            row["memory_gb"] = self.memory
        return row


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
        self.run_state.journal.before = module.settle

    def record(self, trainer: lightning.Trainer, module: Any) -> None:
        """Write the journal's rows of the current step. If the module is read late, they are
        written when the step is, and at the end of the run at once."""
        row = self._row(trainer, module)
        if module.unread is None:
            self._write(row, module)
            return
        module.unread.write = lambda ends: self._write(row, module, ends)
        if module.step >= self.run_state.steps:
            module.settle()

    def _row(self, trainer: lightning.Trainer, module: Any) -> Row:
        """Take the current step's numbers, as far as they will be written."""
        sums = module.sums
        self.last_processed += int(sums["processed"])
        self.last_trained = self.last_trained + sums["tokens"]
        numbers = {"grad_norm": module.grad_norm, "loss": sums["loss"]}
        row = Row(module.step, module.tokens, Copy(numbers), sums["sequences"])
        row.smaller, row.news = module.smaller, module.news
        if module.step % self.every and module.step < self.run_state.steps:
            return row
        now = time.monotonic()
        elapsed = max(now - self.last_time - self.run_state.paused_seconds, 1e-9)
        self.seconds += elapsed
        numbers |= {name: sums[name] for name in ("tokens", "right", "offsets") if name in sums}
        numbers |= {"norms": dict(module.part_norms), "trained": self.last_trained}
        row.numbers, row.density, row.densities = Copy(numbers), module.density, {}
        row.elapsed, row.seconds, row.processed = elapsed, self.seconds, self.last_processed
        row.rates = rates(trainer, module)
        if module.densities and module.step % max(self.every, self.run_state.steps // 100) == 0:
            row.densities = module.densities
        if torch.cuda.is_available():
            row.memory = torch.cuda.max_memory_allocated() / 1e9
        self.last_processed = self.last_trained = 0
        self.last_time, self.run_state.paused_seconds = now, 0.0
        return row

    def _write(self, row: Row, module: Any, ends: bool = False) -> None:
        """Write a step's rows; of a step that ends the run only that it was skipped."""
        journal, numbers = self.run_state.journal, row.numbers.read()
        journal.tokens = row.tokens
        if module.skipped_in_a_row:
            self._skipped(row.step, numbers, row.sequences)
        if ends:
            return
        if row.smaller is not None:
            journal.write("memory", row.step, row.smaller)
        if row.news:
            journal.write("adapter", row.step, row.news)
        if row.rates is None:
            return
        journal.write("step", row.step, row.values(numbers, module.skipped))
        if row.densities:
            journal.write("density", row.step, row.densities)

    def _skipped(self, step: int, numbers: dict[str, Any], sequences: list[Any]) -> None:
        # JSON has no NaN, so these two are text.
        values = {name: str(float(numbers[name])) for name in ("loss", "grad_norm")}
        self.run_state.journal.write(
            "skipped", step, values | {"rows": self.run_state.rows_of(sequences)}
        )

    def on_exception(
        self, trainer: lightning.Trainer, module: Any, exception: BaseException
    ) -> None:
        if not isinstance(exception, NonFinite):
            # A device that fails has no numbers any more, and the first error is the one to see.
            with contextlib.suppress(RuntimeError):
                module.settle()
        elif module.skipped_in_a_row and not module.late:  # raised before the end of the step
            numbers = {"loss": module.sums["loss"], "grad_norm": module.grad_norm}
            self._skipped(module.step, numbers, module.sums["sequences"])

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]


def rates(trainer: lightning.Trainer, module: Any) -> dict[str, float]:
    """Return the rate, and that of each part of an adapter that has several, such as RoSA's."""
    groups = trainer.optimizers[0].param_groups
    parts = module.group_of.items() if len(module.parts) > 1 else ()
    return {"lr": groups[0]["lr"]} | {f"lr/{part}": groups[number]["lr"] for part, number in parts}


def finite(value: float) -> float | None:
    """Return the value, or None if it is NaN or infinite, which JSON cannot represent."""
    return value if math.isfinite(value) else None
