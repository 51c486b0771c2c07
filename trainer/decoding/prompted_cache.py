"""The target's cache for drafters that put embeddings of their own into the verifying pass
(`Drafter.appended`).

    a pass of a sequence: the newest token, the tree's nodes, then for each of these places E chains
    of K embeddings, which are nodes of the tree as any other, but are never kept
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trainer.decoding.target_cache import States, TargetCache, allow_trees
from trainer.drafters import Drafter, DrafterError, Target


def prompts_for(drafter: Drafter | None, target: Target) -> Float[Tensor, "E K d"] | None:
    """Return the embeddings that the verifying pass of a drafter has; None if there are none, or if
    the target cannot read them. Positions that a table has to hold may end within a chain, so that
    a table is none of rotations."""
    prompts = None if drafter is None else drafter.appended(target)
    if prompts is None or not getattr(target.config, "rope_parameters", None):
        return None
    try:
        allow_trees(target)
    except DrafterError:
        return None
    return prompts


class PromptedCache(TargetCache):
    """A TargetCache whose passes over trees have `prompts` (E, K, d) after each place."""

    def __init__(self, target: Target, layers: tuple[int, ...], prompts: Float[Tensor, "E K d"]):
        super().__init__(target, layers, whole=True)
        self.prompts = prompts
        self.extra: list[Float[Tensor, "N E K d"]] = []  # of the last pass
        self.places: list[int] = []  # of each sequence, while a pass over trees runs

    def read(
        self, tokens: Sequence[Int[Tensor, " n+1"]], parents: Sequence[Sequence[int]]
    ) -> list[States]:
        members, count, size = self.prompts.shape
        self.places = [len(row) for row in tokens]
        rows = [torch.cat([row, row.new_zeros(len(row) * members * count)]) for row in tokens]
        try:
            states = super().read(rows, [self._with_chains(above) for above in parents])
        finally:
            places, self.places = self.places, []
        self.extra = [
            hidden[own:].view(own, members, count, size)
            for (hidden, _), own in zip(states, places, strict=True)
        ]
        return [
            (hidden[:own], features[:own])
            for (hidden, features), own in zip(states, places, strict=True)
        ]

    def read_again(self, ids: Int[Tensor, " n"]) -> list[States]:
        self.extra = []
        return super().read_again(ids)

    def after(self, row: int, path: Sequence[int]) -> Float[Tensor, "E K d"] | None:
        return self.extra[row][path[-1] + 1 if path else 0] if self.extra else None

    def inputs(self, ids: Int[Tensor, "B n"]) -> dict[str, Tensor]:
        if not self.places:
            return super().inputs(ids)
        embedded = self.target.embed(ids)
        chains = self.prompts.flatten(0, 1).to(embedded.dtype)
        rows = []
        for row, own in zip(embedded, self.places, strict=True):
            end = own * (1 + len(chains))
            rows.append(torch.cat([row[:own], chains.repeat(own, 1), row[end:]]))
        return {"inputs_embeds": torch.stack(rows)}

    def _with_chains(self, parents: Sequence[int]) -> list[int]:
        """Return the parents of a tree's nodes, followed by those of the chains after the newest
        token and after each node."""
        members, count, _ = self.prompts.shape
        result = list(parents)
        for place in range(-1, len(parents)):
            for _ in range(members):
                above = place
                for _ in range(count):
                    result.append(above)
                    above = len(result) - 1
        return result
