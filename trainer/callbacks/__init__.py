"""Callbacks: evaluation, checkpoints, metrics, stopping and cooldowns around the steps of a run.

Each callback is made from conf/callbacks with the RunState. end_of_step.py has the order in which
they act at the end of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from trainer.cluster.signals import Signals
from trainer.data.held_out import HeldOut
from trainer.data.render import Renderer
from trainer.data.stops import Stops
from trainer.storage.journal import Journal
from trainer.storage.run_folder import RunFolder


@dataclass
class RunState:
    """State that the callbacks share: the parts of the run, its limits, and its progress."""

    folder: RunFolder
    journal: Journal
    signals: Signals
    steps: int  # planned
    held_out: HeldOut | None
    rows_of: Callable[[list[int]], list[str]]  # sequences -> file and line of their rows
    # whether the evaluation before training uses the base without its adapter
    evaluate_base_first: bool
    renderer: Renderer | None = None  # of chats, and the tokens that end an answer, for lm-eval
    stops: Stops = field(default_factory=Stops)
    max_minutes: float | None = None
    max_tokens: int | None = None  # processed; BatchOrder.steps applies it, except to a stream
    stopped: str | None = None  # why the run ends before its planned steps
    paused_seconds: float = 0.0  # seconds since the last step row that were not training
    # the steps before the cooldown, whose checkpoint is kept: extended runs resume from it
    constant_until: int | None = None
    minutes: float = 0.0  # of training, over all starts, up to the step before
    evals_since_best: int = 0
    doubtful: bool = False  # whether the last step was bad (callbacks/rollback.py)


def stop_requested(trainer: Any, module: Any, run_state: RunState) -> bool:
    """Return whether any rank has received a signal. All ranks must call it together; it sets
    `signals.received` on each."""
    if trainer.world_size > 1:
        received = torch.tensor([run_state.signals.received or 0], device=module.device)
        run_state.signals.received = (
            int(trainer.strategy.reduce(received, reduce_op="max")[0]) or None
        )
    return run_state.signals.received is not None


def every_steps(every: float | None, steps: int) -> int | None:
    """Convert an interval to steps. Below 1 it is a fraction of the run; None means never."""
    return None if every is None else max(1, round(every * steps) if every < 1 else int(every))
