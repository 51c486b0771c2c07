"""Drafters without training: chosen when decoding, for any target."""

from __future__ import annotations

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor

from trainer.drafters import Drafter, DrafterError, Target, TargetOutput


class Untrained(Drafter):
    """A drafter without a loss, of chains or trees up to `depth` tokens deep."""

    def __init__(self, depth: int):
        super().__init__()
        self.offsets, self.weights = depth, [0.0] * depth

    def states(self, output: TargetOutput, target: Target) -> Iterator[Float[Tensor, "B T d"]]:
        raise DrafterError(
            f"{type(self).__name__} is not trained: it is chosen when decoding, with drafter="
        )
