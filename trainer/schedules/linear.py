"""Linear decay after a linear warm-up."""

from trainer.schedules import length, warmed_up


def linear(step: int, steps: int, warmup: float, final: float) -> float:
    """Return the factor of the peak rate at `step` (0-based) of `steps`: 1 - (1 - final) x, where x
    is the completed share of the decay."""
    rise = length(warmup, steps)
    if step < rise:
        return warmed_up(step, rise)
    return 1 - (1 - final) * min(1.0, (step - rise) / max(1, steps - rise))
