"""Cosine decay after a linear warm-up (Loshchilov and Hutter 2016, arXiv 1608.03983, without
restarts)."""

import math

from trainer.schedules import length, warmed_up


def cosine(step: int, steps: int, warmup: float, final: float) -> float:
    """Return the factor of the peak rate at `step` (0-based) of `steps`: final + (1 - final)
    (1 + cos π x) / 2."""
    rise = length(warmup, steps)
    if step < rise:
        return warmed_up(step, rise)
    x = min(1.0, (step - rise) / max(1, steps - rise))
    return final + (1 - final) * (1 + math.cos(math.pi * x)) / 2
