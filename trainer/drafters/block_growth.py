"""The tree that a block drafter (trainer.drafters.block) grows for one sequence."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trainer.drafters import Target


class BlockGrowth:
    """A trainer.drafters.Growth: a node's logits are its slot's, with the bias of its token."""

    branches = True
    confidence: Float[Tensor, " m"] | None = None

    def __init__(
        self, drafter: Any, target: Target, u: Float[Tensor, "K d"], anchor: Int[Tensor, " 1"]
    ):
        self.drafter, self.u, self.vocabulary = drafter, u, drafter.vocabulary
        self.head, self.depth = drafter.draft_head(target), len(u)
        self.depths = torch.zeros(1, dtype=torch.long, device=u.device)
        self.tokens = anchor
        # the Markov head's s of the slots after the newest token and after each node
        self.root, self.s = drafter.head_input(u[:1], anchor, drafter.first_state(u[:1]))

    @torch.no_grad()
    def first(self) -> Float[Tensor, " V"]:
        return self.head(self.root)[0]

    @torch.no_grad()
    def extend(self, tokens: Int[Tensor, " m"], parents: Int[Tensor, " m"]) -> Float[Tensor, "m V"]:
        above = self.depths[parents + 1]
        if self.drafter.confidence is not None:
            predicted = self.drafter.acceptance_logits(self.u[above], self.tokens[parents + 1])
            self.confidence = predicted.sigmoid()
        self.depths = torch.cat([self.depths, above + 1])
        self.tokens = torch.cat([self.tokens, tokens])
        # Nothing is read of the logits after the last level.
        slot = (above + 1).clamp_max(self.depth - 1)
        z, s = self.drafter.head_input(self.u[slot], tokens, self.s[parents + 1])
        self.s = torch.cat([self.s, s])
        return self.head(z)
