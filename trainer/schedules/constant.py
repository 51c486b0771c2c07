"""Constant after a linear warm-up."""

from trainer.schedules import length, warmed_up


def constant(step: int, steps: int, warmup: float) -> float:
    """Return the factor of the peak rate at `step` (0-based) of `steps`."""
    return warmed_up(step, length(warmup, steps))
