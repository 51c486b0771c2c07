"""Piecewise constant after a linear warm-up (DeepSeek LLM, arXiv 2401.02954, section 2.3: 31.6 % of
the peak from 80 % of the run on, 10 % from 90 % on)."""

from trainer.schedules import length, warmed_up


def multistep(
    step: int, steps: int, warmup: float, milestones: list[float], factors: list[float]
) -> float:
    """Return the factor of the peak rate at `step` (0-based) of `steps`: factors[i] from
    milestones[i] on, and 1 before the first. A milestone within the warm-up scales the warm-up."""
    level = 1.0
    for milestone, factor in zip(milestones, factors, strict=True):
        if step >= length(milestone, steps):
            level = factor
    return level * warmed_up(step, length(warmup, steps))
