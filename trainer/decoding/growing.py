"""The shapes of trees (trainer.decoding.trees), and the trees of several sequences that grow in one
pass of the drafter for each level.

Sequences of a batch have trees of the same form, or trees that are filled up to the same number of
nodes a level. Each tree ends at its own depth: a node that a sequence does not have is computed and
left out.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from trainer.decoding.drawing import Drawing
from trainer.decoding.policies import Level, Policy
from trainer.drafters import BatchGrowth, Draft, Growth


class Shape(Protocol):
    """A way to grow trees; `branches` is True if a node may have several children."""

    branches: bool

    def __call__(self, growth: Growth, drawing: Drawing) -> Draft: ...


@runtime_checkable
class Together(Protocol):
    """A shape that also grows the trees of several sequences at once."""

    def together(self, growth: BatchGrowth, drawing: Drawing, limits: Sequence[int]) -> list[Draft]:
        """Return a tree for each sequence. None of its nodes is deeper than its limit."""
        ...


class Alone:
    """The growth of one sequence, as of a batch."""

    def __init__(self, growth: Growth):
        self.growth, self.depth, self.branches = growth, growth.depth, growth.branches
        self.vocabulary = growth.vocabulary
        self.confidence: Float[Tensor, "1 m"] | None = None

    def first(self) -> Float[Tensor, "1 v"]:
        return self.growth.first().unsqueeze(0)

    def extend(
        self, tokens: Int[Tensor, "1 m"], parents: Int[Tensor, "1 m"]
    ) -> Float[Tensor, "1 m v"]:
        logits = self.growth.extend(tokens[0], parents[0])
        confidence = self.growth.confidence
        self.confidence = None if confidence is None else confidence.unsqueeze(0)
        return logits.unsqueeze(0)


class Ends:
    """The depth at which each sequence's tree ends: its limit, or where the policy ended it."""

    def __init__(self, limits: Sequence[int], policy: Policy | None):
        self.depths = list(limits)
        # A policy may keep what it saw of a tree.
        self.policies = [copy.copy(policy) for _ in limits]

    def going(self, number: int) -> bool:
        """Return whether some tree has a level of this number."""
        return max(self.depths) >= number

    def ask(self, number: int, q: Tensor, confidence: Tensor, alive: Tensor) -> None:
        """Let the policies decide about the level of this number: q (B, m, v), the others
        (B, m)."""
        for row, (depth, policy) in enumerate(zip(self.depths, self.policies, strict=True)):
            if policy is None or depth < number:
                continue
            real = alive[row] > -math.inf
            level = Level(number, q[row][real], confidence[row][real], alive[row][real])
            if not len(level.alive) or not policy(level):
                self.depths[row] = number - 1
