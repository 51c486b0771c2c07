"""Drafts of several sequences by a causal model: their texts in one pass, then a level of all trees
in each further pass.

Node i of a sequence is at place length + i of its entries; the next text writes over it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trainer.drafters import TargetUpdate, passes
from trainer.drafters.batch_passes import layout, padded
from trainer.drafters.ragged import RaggedMemory
from trainer.drafters.tree_places import Columns, TreePlaces

# The states (B, m, d) of tokens (B, m) at these columns.
Read = Callable[[Tensor, Columns], Tensor]


class TreeBatch:
    """A trainer.drafters.BatchGrowth. `head` returns the logits of states."""

    branches = True
    vocabulary: Int[Tensor, " v"] | None = None
    confidence: Float[Tensor, "B m"] | None = None

    @torch.no_grad()
    def __init__(
        self,
        depth: int,
        memory: RaggedMemory,
        updates: Sequence[TargetUpdate],
        read: Read,
        head: Callable[[Tensor], Tensor],
    ):
        self.depth, self.memory, self.read, self.head = depth, memory, read, head
        ids, counts = padded([passes.text_of(update) for update in updates])
        none = torch.zeros(0, dtype=torch.long, device=ids.device)
        states = self._pass(ids, layout(memory.lengths, counts, none, none.bool().view(0, 0)))
        memory.lengths = [
            length + count for length, count in zip(memory.lengths, counts, strict=True)
        ]
        last = torch.tensor(counts).to(ids.device, non_blocking=True) - 1
        self.root = head(states[torch.arange(len(states), device=ids.device), last])
        self.nodes = TreePlaces(memory.lengths, ids.device)

    def first(self) -> Float[Tensor, "B v"]:
        return self.root

    @torch.no_grad()
    def extend(
        self, tokens: Int[Tensor, "B m"], parents: Int[Tensor, "B m"]
    ) -> Float[Tensor, "B m v"]:
        states = self._pass(tokens, self.nodes.add(parents))
        return self.head(states.flatten(0, 1)).unflatten(0, tokens.shape)

    def _pass(self, ids: Tensor, columns: Columns) -> Float[Tensor, "B n d"]:
        for entries in self.memory.layers:
            entries.place(columns.at, columns.keys.shape[1])
        return self.read(ids, columns)
