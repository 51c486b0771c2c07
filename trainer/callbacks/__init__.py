"""What happens around the steps of a run. Each callback is made from conf/callbacks with the run's
Context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from trainer.cluster.signals import Signals
from trainer.data.held_out import HeldOut
from trainer.storage.journal import Journal
from trainer.storage.run_folder import RunFolder


@dataclass
class Context:
    """What callbacks share."""

    folder: RunFolder
    journal: Journal
    signals: Signals
    steps: int  # planned
    held_out: HeldOut | None
    rows_of: Callable[[list[int]], list[str]]  # sequences -> file and line of their rows
    before: bool  # whether the base alone can answer for the evaluation before training
    max_minutes: float | None = None
    max_tokens: int | None = None  # processed; a plan of known length ends at them by itself
    stopped: str | None = None  # why the run ends before its planned steps
    paused: float = 0.0  # seconds since the last step row that were not training
    # the steps before the cooldown, whose checkpoint stays: longer runs go on from it
    constant_until: int | None = None
    minutes: float = 0.0  # of training, over all starts, up to the step before
    without: int = 0  # evaluations since the best one
    improved: bool = False  # whether the evaluation of the step at hand was the best so far


def stop_requested(lightning_: Any, module: Any, context: Context) -> bool:
    """Whether a signal has come to any process, of which each then knows; all of them have to
    ask."""
    if lightning_.world_size > 1:
        told = torch.tensor([context.signals.received or 0], device=module.device)
        context.signals.received = int(lightning_.strategy.reduce(told, reduce_op="max")[0]) or None
    return context.signals.received is not None


def every_steps(every: float | None, steps: int) -> int | None:
    """A distance in steps: below 1 a fraction of the run; None is never."""
    return None if every is None else max(1, round(every * steps) if every < 1 else int(every))
