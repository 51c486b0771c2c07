"""Kangaroo's drafts for several sequences: texts and trees of all in one pass of the target's first
layers and the adapter (trainer.drafters.kangaroo).

Node i of a sequence is at place length + i of its entries; the next text writes over it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trainer.drafters import Target, TargetUpdate, passes
from trainer.drafters.batch_passes import ModelEntries, layout, padded
from trainer.drafters.ragged import RaggedMemory
from trainer.drafters.tree_places import TreePlaces


class KangarooBatch:
    """A trainer.drafters.BatchGrowth. Of the memory's entries the adapter's come last."""

    branches = True
    vocabulary: Int[Tensor, " v"] | None = None
    confidence: Float[Tensor, "B m"] | None = None

    @torch.no_grad()
    def __init__(
        self, drafter: Any, target: Target, memory: RaggedMemory, updates: Sequence[TargetUpdate]
    ):
        self.drafter, self.target, self.memory = drafter, target, memory
        self.depth = drafter.depth
        ids, counts = padded([passes.text_of(update) for update in updates])
        none = torch.zeros(0, dtype=torch.long, device=ids.device)
        text = layout(memory.lengths, counts, none, none.bool().view(0, 0))
        m = self._read(ids, text.at, text.positions, text.keys, text.sees)
        memory.lengths = [
            length + count for length, count in zip(memory.lengths, counts, strict=True)
        ]
        last = torch.tensor(counts).to(ids.device, non_blocking=True) - 1
        self.root = target.head(m[torch.arange(len(m), device=ids.device), last])
        self.nodes = TreePlaces(memory.lengths, ids.device)

    def first(self) -> Float[Tensor, "B V"]:
        return self.root

    @torch.no_grad()
    def extend(
        self, tokens: Int[Tensor, "B m"], parents: Int[Tensor, "B m"]
    ) -> Float[Tensor, "B m V"]:
        new = self.nodes.add(parents)
        m = self._read(tokens, new.at, new.positions, new.keys, new.sees)
        return self.target.head(m.flatten(0, 1)).unflatten(0, tokens.shape)

    def _read(
        self, ids: Tensor, at: Tensor, positions: Tensor, keys: Tensor, sees: Tensor
    ) -> Float[Tensor, "B n d"]:
        for entries in self.memory.layers:
            entries.place(at, keys.shape[1])
        *first, own = self.memory.layers
        cache = ModelEntries(first)
        return self.drafter.run(self.target, cache, own, ids, positions, keys, sees)
