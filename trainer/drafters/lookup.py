"""Prompt lookup (Saxena 2023; Somasundaram et al. 2024, arXiv 2411.04713): what followed the last
few tokens earlier in the text.

    x_{t-n+1} .. x_t = x_{s-n+1} .. x_s        draft = x_{s+1} .. x_{s+count}        s < t, the longest n <= `longest` that is found

Nothing is trained and nothing of the target is read. Of several places s the last one is taken that
`count` tokens follow, else the first, after which most tokens stand.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

import torch

from trainer.drafters import Draft, DrafterError, News, Strategy, Target, chain
from trainer.drafters.untrained import Untrained


@dataclass
class Memory:
    """A sequence so far, and behind which places each n-gram ends, in ascending order."""

    tokens: list[int] = field(default_factory=list)
    ends: dict[tuple[int, ...], list[int]] = field(default_factory=dict)


class PromptLookup(Untrained):
    """Chains of up to `count` tokens, chosen without chance, copied from behind the last `longest`
    tokens or fewer; the strategy is not asked.

    Raises:
        DrafterError: a number is less than 1.
    """

    def __init__(self, count: int = 10, longest: int = 3):
        for name, value in (("count", count), ("longest", longest)):
            if value < 1:
                raise DrafterError(
                    f"{name}={value}: prompt lookup copies at least 1 token behind at least 1"
                )
        super().__init__(count)
        self.longest = longest

    def start(self, target: Target) -> Memory:
        return Memory()

    @torch.no_grad()
    def propose(self, memory: Memory, target: Target, news: News, strategy: Strategy) -> Draft:
        if news.first is not None:
            self._take(memory, int(news.first))
        for token in news.ids.tolist():
            self._take(memory, token)
        return chain(torch.tensor(self._copied(memory), dtype=torch.long, device=news.ids.device))

    def _take(self, memory: Memory, token: int) -> None:
        memory.tokens.append(token)
        for n in range(1, min(self.longest, len(memory.tokens)) + 1):
            memory.ends.setdefault(tuple(memory.tokens[-n:]), []).append(len(memory.tokens))

    def _copied(self, memory: Memory) -> list[int]:
        tokens = memory.tokens
        for n in range(min(self.longest, len(tokens)), 0, -1):
            places = memory.ends[tuple(tokens[-n:])]  # the last of them is the n-gram itself
            if len(places) > 1:
                enough = bisect_right(places, len(tokens) - self.offsets)
                place = places[max(0, enough - 1)]
                return tokens[place : place + self.offsets]
        return []
