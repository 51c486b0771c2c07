"""Learning-rate schedules: pure functions of the step, `step, steps -> factor of the peak rate`, so
that a run which goes on, or branches, inherits no state. A length below 1 is a fraction of the
run's steps."""

from collections.abc import Callable
from typing import Any


def length(value: float, steps: int) -> int:
    """A length in steps: as it is from 1 on, a fraction of `steps` below."""
    return round(value * steps) if value < 1 else int(value)


def warmed_up(step: int, warmup: int) -> float:
    """Linear warm-up: 1/warmup at step 0, so that the first step already learns, and 1 from step
    warmup - 1 on."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def factor(
    schedule: Callable[..., float], step: int, steps: int, restart: int, cooling: Any = None
) -> float:
    """The factor at a step of a run whose schedule begins anew at the step `restart`, 0 for one
    that does not. `cooling` is the cooldown.Cooling that takes over from the schedule, if one
    does."""
    if cooling is not None and step >= cooling.start:
        return cooling.factor(step)
    return (
        schedule(step - restart, steps=steps - restart)
        if step >= restart
        else schedule(step, steps=steps)
    )
