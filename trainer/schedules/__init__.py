"""Learning rate schedules: pure functions of the step, `step, steps -> factor of the peak rate`.

A resumed run, or a branch, therefore inherits no state. A length below 1 is a fraction of the run's
steps.
"""

from collections.abc import Callable
from typing import Any


def length(value: float, steps: int) -> int:
    """Return a length in steps. A value below 1 is a fraction of `steps`; conf/ refuses 1.0."""
    return round(value * steps) if value < 1 else int(value)


def warmed_up(step: int, warmup: int) -> float:
    """Return the factor of a linear warm-up: 1/warmup at step 0, so that the first step already
    trains, and 1 from step warmup - 1 on."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def factor(
    schedule: Callable[..., float], step: int, steps: int, restart: int, cooling: Any = None
) -> float:
    """Return the factor at a step.

    The schedule starts again at the step `restart`, which is 0 for runs without a restart.
    `cooling` is the RuntimeCooldown that replaces the schedule from its start on, if there is one.
    """
    if cooling is not None and step >= cooling.start:
        return cooling.factor(step)
    if step >= restart:
        return schedule(step - restart, steps=steps - restart)
    return schedule(step, steps=steps)
