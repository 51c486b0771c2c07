"""The head that a run keeps if its base brings one: the stock head, unless a checkpoint is accepted
more often on held-out rows.

    drafter_guard.json in the run's folder: {metric, stock, trained, step, kept}
    stock      the metric before training
    trained    the best of the checkpoints that still exist, null without one; of `step`
    kept       that step, 0 for the stock head
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.drafters import Drafter
from trainer.storage import atomic, checkpoints, door, journal

log = logging.getLogger("trainer")

FILE, METRIC = "drafter_guard.json", "accepted"
_SHAPE = {"metric": str, "stock": float, "kept": int, "step": int, "trained": door.MAYBE_NUMBER}


@dataclass(frozen=True)
class Verdict:
    """The measured acceptance of the stock head and of the best trained one."""

    stock: float
    trained: float | None
    step: int
    kept: int
    metric: str = METRIC

    def text(self) -> str:
        """Return a sentence about what is kept."""
        best = "no checkpoint" if self.trained is None else f"{self.trained:.3f} after training"
        if not self.kept:
            worse = self.trained is not None and self.trained < self.stock
            what = "made the stock head worse" if worse else "did not improve the stock head"
            return (
                f"Training {what}: {self.stock:.3f} {self.metric} tokens a"
                f" step on held-out rows before, {best} (best at step {self.step}). The stock head"
                " is kept. A lower optimizer.lr may help"
            )
        return (
            f"The trained head of step {self.kept} is kept: {self.stock:.3f} {self.metric} tokens a"
            f" step on held-out rows before, {best}"
        )


def judge(run: Path, steps: Sequence[int]) -> Verdict | None:
    """Compare the stock head with those of `steps`, by the run's evaluations. Write the verdict
    into the run's folder. None if nothing was measured before training."""
    values = {
        row["step"]: float(row[METRIC])
        for row in journal.read(run / "metrics.jsonl")
        if row["kind"] == "evaluation" and METRIC in row
    }
    if 0 not in values:
        return None
    stock, trained = values[0], None
    step = max((s for s in steps if s in values and s), key=lambda s: (values[s], -s), default=0)
    if step:
        trained = values[step]
    better = trained is not None and trained > stock
    verdict = Verdict(stock, trained, step, step if better else 0)
    atomic.write_text(run / FILE, json.dumps(asdict(verdict), indent=2) + "\n")
    log.log(logging.INFO if better else logging.WARNING, "%s", verdict.text())
    return verdict


def read(run: Path) -> Verdict | None:
    """Return the verdict of a run; None if it has none."""
    content: Any = door.decoration(run / FILE, _SHAPE, None)
    return None if content is None else Verdict(**content)


def load(drafter: Drafter, run: Path, which: str, saved: dict[str, Any]) -> None:
    """Load a drafter's weights from the content of a checkpoint. For `last` and `best`, a head that
    the base brings is the one that the run kept."""
    verdict = read(run) if drafter.guarded and not which.isdecimal() else None
    if verdict is None:
        drafter.load_state(saved["drafter"])
    elif not verdict.kept:
        drafter.restore()
    else:
        checkpoint = checkpoints.Checkpoint.at(run / "checkpoints", verdict.kept)
        there = checkpoint in checkpoints.complete(run / "checkpoints")
        drafter.load_state((checkpoints.load(checkpoint) if there else saved)["drafter"])
