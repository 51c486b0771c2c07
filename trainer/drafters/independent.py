"""Drafts of heads that do not read drafted tokens, for one sequence. trainer.drafters.ragged has
them for several."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor


class IndependentGrowth:
    """The growth of heads that do not read drafted tokens: all nodes of a depth have the same
    logits. `logits` returns those of an offset (V,), and is called once for each offset that a
    shape reaches."""

    branches = True
    vocabulary: Int[Tensor, " v"] | None = None
    confidence: Float[Tensor, " m"] | None = None

    def __init__(self, offsets: int, logits: Callable[[int], Float[Tensor, " V"]]):
        self.depth, self._logits = offsets, functools.cache(torch.no_grad()(logits))
        self._depths: list[int] = []  # of the nodes so far

    @classmethod
    def read(
        cls, head: Callable[[Tensor], Tensor], states: Float[Tensor, "K d"]
    ) -> IndependentGrowth:
        """Return the growth of K offsets by what the head reads at each. One call gives the logits
        of all, since a head's weights take longer to read than few rows to compute."""
        logits = functools.cache(lambda: head(states))
        return cls(len(states), lambda k: logits()[k - 1])

    def first(self) -> Float[Tensor, " V"]:
        return self._logits(1)

    def extend(self, tokens: Int[Tensor, " m"], parents: Int[Tensor, " m"]) -> Float[Tensor, "m V"]:
        parent = int(parents[0])
        depth = 1 + (self._depths[parent] if parent >= 0 else 0)
        self._depths += [depth] * len(tokens)
        return self._logits(depth + 1).expand(len(tokens), -1)
