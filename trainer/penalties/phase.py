"""A phase of a run in which a penalty acts, so that training is dense, sparse, and dense again.

    share(p) = min(1, (p - start) / ramp, (end - p) / ramp)   if start ≤ p < end, else 0

p is the share of the run's steps that are done. Training that switches between dense and sparse
phases is SSD's (arXiv 2410.03440); its clusters of neurons are not used here.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.models.base import BaseError


@dataclass(frozen=True)
class Phase:
    """A phase from `start` to `end`, both shares of the run, with a linear `ramp` on each side.

    Raises:
        BaseError: there is no such phase.
    """

    start: float
    end: float
    ramp: float

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1:
            raise BaseError(
                f"penalty.start={self.start:g} and penalty.end={self.end:g}: expected 0 <= start <"
                " end <= 1, as shares of the run: set penalty.start=0 penalty.end=1"
            )
        # at the whole run's sides there is no ramp
        sides = (self.start > 0) + (self.end < 1)
        if sides * self.ramp > self.end - self.start + 1e-12:
            raise BaseError(
                f"penalty.ramp={self.ramp:g}: the phase from penalty.start={self.start:g} to"
                f" penalty.end={self.end:g} has no room for {sides} of them: lower penalty.ramp"
            )

    def share(self, step: int, steps: int) -> float:
        """Return the share of the weight in a 0-based step of the planned `steps`."""
        place = step / max(1, steps)
        if not self.start <= place < self.end:
            return 0.0
        if not self.ramp:
            return 1.0
        up = (place - self.start) / self.ramp if self.start > 0 else 1.0
        down = (self.end - place) / self.ramp if self.end < 1 else 1.0
        return max(0.0, min(1.0, up, down))
