"""The trees of several sequences that a block drafter (trainer.drafters.block) grows together."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trainer.drafters import Target


class BlockBatch:
    """A trainer.drafters.BatchGrowth, of block.BlockGrowth's numbers."""

    branches = True
    vocabulary: Int[Tensor, " v"] | None = None
    confidence: Float[Tensor, "B m"] | None = None

    def __init__(
        self,
        drafter: Any,
        target: Target,
        u: Float[Tensor, "B K d"],
        anchor: Int[Tensor, "B 1"],
    ):
        self.drafter, self.u, self.tokens = drafter, u, anchor
        self.head, self.depth = drafter.draft_head(target), u.shape[1]
        self.depths = torch.zeros_like(anchor)

    @torch.no_grad()
    def first(self) -> Float[Tensor, "B V"]:
        return self.head(self.drafter.head_input(self.u[:, 0], self.tokens[:, 0]))

    @torch.no_grad()
    def extend(
        self, tokens: Int[Tensor, "B m"], parents: Int[Tensor, "B m"]
    ) -> Float[Tensor, "B m V"]:
        above = self.depths.gather(1, parents + 1)
        if self.drafter.confidence is not None:
            z = self._input(above, self.tokens.gather(1, parents + 1))
            self.confidence = self.drafter.acceptance_logits(z).sigmoid().unflatten(0, tokens.shape)
        self.depths = torch.cat([self.depths, above + 1], dim=1)
        self.tokens = torch.cat([self.tokens, tokens], dim=1)
        # Nothing is read of the logits after the last level.
        slot = (above + 1).clamp_max(self.depth - 1)
        return self.head(self._input(slot, tokens)).unflatten(0, tokens.shape)

    def _input(self, slot: Int[Tensor, "B m"], before: Int[Tensor, "B m"]) -> Tensor:
        u = self.u.gather(1, slot.unsqueeze(2).expand(-1, -1, self.u.shape[2]))
        return self.drafter.head_input(u.flatten(0, 1), before.flatten())
