"""Prompt lookup (Saxena 2023; Somasundaram et al. 2024, arXiv 2411.04713): copy what followed the
last few tokens earlier in the text.

    x_{t-n+1} .. x_t = x_{s-n+1} .. x_s        s < t, with the longest n <= `longest` that occurs
    draft = x_{s+1} .. x_{s+count}

Nothing is trained and no state of the target is read. Of several s the last one with `count` tokens
after it is used, or else the first, which has the most tokens after it.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

import torch

from trainer.drafters import Draft, DrafterError, Target, TargetUpdate, TreeBuilder, chain
from trainer.drafters.untrained import Untrained


@dataclass
class Memory:
    """A sequence so far, and the positions after each n-gram, in ascending order."""

    tokens: list[int] = field(default_factory=list)
    ends: dict[tuple[int, ...], list[int]] = field(default_factory=dict)


class PromptLookup(Untrained):
    """Chains of up to `count` tokens, copied from after an earlier occurrence of the last `longest`
    tokens or fewer. They are chosen without chance, and the shape is not used.

    Raises:
        DrafterError: a number is less than 1.
    """

    def __init__(self, count: int = 10, longest: int = 3):
        for name, value in (("count", count), ("longest", longest)):
            if value < 1:
                raise DrafterError(
                    f"{name}={value}: prompt lookup copies at least 1 token after at least 1 token"
                )
        super().__init__(count)
        self.longest = longest

    def start(self, target: Target) -> Memory:
        return Memory()

    @torch.no_grad()
    def propose(
        self, memory: Memory, target: Target, update: TargetUpdate, build: TreeBuilder
    ) -> Draft:
        if update.first is not None:
            self._take(memory, int(update.first))
        for token in update.ids.tolist():
            self._take(memory, token)
        return chain(torch.tensor(self._copied(memory), dtype=torch.long, device=update.ids.device))

    def _take(self, memory: Memory, token: int) -> None:
        memory.tokens.append(token)
        for n in range(1, min(self.longest, len(memory.tokens)) + 1):
            memory.ends.setdefault(tuple(memory.tokens[-n:]), []).append(len(memory.tokens))

    def _copied(self, memory: Memory) -> list[int]:
        tokens = memory.tokens
        for n in range(min(self.longest, len(tokens)), 0, -1):
            ends = memory.ends[tuple(tokens[-n:])]  # the last one is the n-gram itself
            if len(ends) > 1:
                enough = bisect_right(ends, len(tokens) - self.offsets)
                start = ends[max(0, enough - 1)]
                return tokens[start : start + self.offsets]
        return []
