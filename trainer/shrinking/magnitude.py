"""Pruning by magnitude: the smallest |W| of each group, or row, become zero."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from trainer.shrinking.patterns import Pattern


def prune(weight: Float[Tensor, "o i"], pattern: Pattern) -> Float[Tensor, "o i"]:
    """Return the pruned weight, in the same dtype."""
    return weight * pattern.keep(weight.abs())
