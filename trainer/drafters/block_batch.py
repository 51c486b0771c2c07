"""The trees of several sequences that a block drafter (trainer.drafters.block) grows together."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trainer.drafters import Target


class BlockBatch:
    """A trainer.drafters.BatchGrowth, of block_growth.BlockGrowth's numbers."""

    branches = True
    confidence: Float[Tensor, "B m"] | None = None

    def __init__(
        self,
        drafter: Any,
        target: Target,
        u: Float[Tensor, "B K d"],
        anchor: Int[Tensor, "B 1"],
    ):
        self.drafter, self.u, self.tokens = drafter, u, anchor
        self.vocabulary: Int[Tensor, " v"] | None = drafter.vocabulary
        self.head, self.depth = drafter.draft_head(target), u.shape[1]
        self.depths = torch.zeros_like(anchor)
        first = u[:, :1]
        # the Markov head's s of the slots after the newest token and after each node
        self.root, self.s = drafter.head_input(first, anchor, drafter.first_state(first))

    @torch.no_grad()
    def first(self) -> Float[Tensor, "B V"]:
        return self.head(self.root[:, 0])

    @torch.no_grad()
    def extend(
        self, tokens: Int[Tensor, "B m"], parents: Int[Tensor, "B m"]
    ) -> Float[Tensor, "B m V"]:
        above = self.depths.gather(1, parents + 1)
        if self.drafter.confidence is not None:
            before = self.tokens.gather(1, parents + 1).flatten()
            u = _rows(self.u, above).flatten(0, 1)
            predicted = self.drafter.acceptance_logits(u, before)
            self.confidence = predicted.sigmoid().unflatten(0, tokens.shape)
        self.depths = torch.cat([self.depths, above + 1], dim=1)
        self.tokens = torch.cat([self.tokens, tokens], dim=1)
        # Nothing is read of the logits after the last level.
        slot = (above + 1).clamp_max(self.depth - 1)
        z, s = self.drafter.head_input(_rows(self.u, slot), tokens, _rows(self.s, parents + 1))
        self.s = torch.cat([self.s, s], dim=1)
        return self.head(z.flatten(0, 1)).unflatten(0, tokens.shape)


def _rows(states: Float[Tensor, "B n c"], rows: Int[Tensor, "B m"]) -> Float[Tensor, "B m c"]:
    return states.gather(1, rows.unsqueeze(2).expand(-1, -1, states.shape[2]))
