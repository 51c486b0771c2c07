"""Decay with the inverse square root of the step after a linear warm-up (Vaswani et al. 2017, arXiv
1706.03762, section 5.3, in the form of transformers' get_inverse_sqrt_schedule)."""

import math

from trainer.schedules import length, warmed_up


def inverse_sqrt(step: int, steps: int, warmup: float, timescale: float | None) -> float:
    """Return the factor of the peak rate at `step` (0-based) of `steps`: sqrt(τ / (step - W + τ))
    after W steps of warm-up. τ is the timescale in steps, at least 1. Without a timescale τ is W,
    which gives sqrt(W / step)."""
    rise = length(warmup, steps)
    if step < rise:
        return warmed_up(step, rise)
    tau = max(1, rise if timescale is None else length(timescale, steps))
    return math.sqrt(tau / (step - rise + tau))
