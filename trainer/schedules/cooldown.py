"""Constant, then a cooldown at the end (Hägele et al. 2024, arXiv 2405.18392, section 3)."""

import math

from trainer.schedules import length, warmed_up

SHAPES = {
    "1-sqrt": lambda x: 1 - math.sqrt(x),
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}


def cooldown(step: int, steps: int, warmup: float, cooldown: float, shape: str, final: float) -> float:
    """Factor of the peak rate at `step` (0-based) of `steps`: final + (1 - final) f(x) over the last steps, x from 0 to
    just below 1, f one of SHAPES."""
    down = length(cooldown, steps)
    start = steps - down
    if step < start:
        return warmed_up(step, length(warmup, steps))
    x = min(1.0, (step - start) / down) if down else 0.0
    return final + (1 - final) * SHAPES[shape](x)
