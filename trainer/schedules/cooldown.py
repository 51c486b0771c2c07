"""Constant, then a cooldown at the end (Hägele et al. 2024, arXiv 2405.18392, section 3)."""

import math
from dataclasses import dataclass

from trainer.schedules import length, warmed_up

SHAPES = {
    "1-sqrt": lambda x: 1 - math.sqrt(x),
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}


def cooldown(
    step: int,
    steps: int,
    warmup: float,
    cooldown: float,
    cooldown_tokens: int | None,
    shape: str,
    final: float,
) -> float:
    """Return the factor of the peak rate at `step` (0-based) of `steps`.

    Over the last steps it is final + (1 - final) f(x) with x from 0 to just below 1 and f one of
    SHAPES, or final^x (see `fall`).
    """
    assert cooldown_tokens is None, (
        "assembly.schedule, which knows the tokens of each step, converts them to steps"
    )
    cooldown_steps = length(cooldown, steps)
    start = steps - cooldown_steps
    if step < start:
        return warmed_up(step, length(warmup, steps))
    x = min(1.0, (step - start) / cooldown_steps) if cooldown_steps else 0.0
    return fall(x, shape, final)


@dataclass(frozen=True)
class RuntimeCooldown:
    """A cooldown that started at run time, or in a run that branches off another run's
    checkpoint."""

    start: int  # the step (0-based) from which the rate falls
    steps: int
    level: float  # the factor of the peak rate at its start
    shape: str
    final: float  # the factor at its end, as a fraction of `level`

    def factor(self, step: int) -> float:
        """Return the factor of the peak rate at `step`, which is `start` or later."""
        return self.level * fall(min(1.0, (step - self.start) / self.steps), self.shape, self.final)


def fall(x: float, shape: str, final: float) -> float:
    """Return the value at x of a curve from 1 at x = 0 to `final` at x = 1. `exponential` is
    final^x and needs final > 0 (MiniCPM, arXiv 2404.06395, uses 0.5^x)."""
    if shape == "exponential":
        return final**x
    return final + (1 - final) * SHAPES[shape](x)
