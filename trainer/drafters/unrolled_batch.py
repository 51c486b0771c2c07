"""The trees of several sequences that EAGLE's heads (trainer.drafters.unrolled) grow together."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trainer.drafters import Target
from trainer.drafters.layers import autocast_like, window
from trainer.drafters.ragged import RaggedMemory, Updates
from trainer.drafters.tree_places import TreePlaces


class UnrolledBatch:
    """A trainer.drafters.BatchGrowth. Node i of a sequence is at place length + i; the next update
    overwrites it."""

    branches = True
    confidence: Float[Tensor, "B m"] | None = None

    @torch.no_grad()
    def __init__(self, drafter: Any, target: Target, memory: RaggedMemory, read: Updates):
        self.drafter, self.target, self.entries = drafter, target, memory.layers[0]
        self.like = read.hidden[:0, 0]  # has the dtype of the target's states
        self.depth, self.vocabulary = drafter.depth, drafter.vocabulary
        device = read.ids.device
        embedded = drafter.in_own_dtype(target.embed(read.ids))
        with autocast_like(read.hidden):
            hidden = drafter.first_input(
                drafter.in_own_dtype(read.hidden), drafter.in_own_dtype(read.features)
            )
            places = memory.read(read.counts, 0, device)
            sees = places.within(window(drafter.around(target)))
            out = self._step(embedded, hidden, places.at, sees)
        out = read.newest(out).unsqueeze(1)
        self.nodes = TreePlaces(memory.lengths, device)
        # of the newest token, then of each node
        self.head_inputs = self._head_input(out)
        self.root = self._logits(self.head_inputs)[:, 0]
        self.next_inputs = drafter.next_input(out)  # (B, 1 + nodes, d)

    def first(self) -> Float[Tensor, "B v"]:
        return self.root

    @torch.no_grad()
    def extend(
        self, tokens: Int[Tensor, "B m"], parents: Int[Tensor, "B m"]
    ) -> Float[Tensor, "B m v"]:
        drafter, target = self.drafter, self.target
        new = self.nodes.add(parents)
        self.entries.place(new.at, new.keys.shape[1])
        embedded = drafter.in_own_dtype(target.embed(tokens))
        with autocast_like(self.like):
            out = self._step(
                embedded,
                _rows(self.next_inputs, parents + 1),
                new.positions,
                new.within(window(drafter.around(target))),
            )
            self.next_inputs = torch.cat([self.next_inputs, drafter.next_input(out)], dim=1)
        read_above = _rows(self.head_inputs, parents + 1)
        predicted = drafter.predicted(1, read_above.flatten(0, 1))
        self.confidence = None if predicted is None else predicted.unflatten(0, tokens.shape)
        read = self._head_input(out)
        self.head_inputs = torch.cat([self.head_inputs, read], dim=1)
        return self._logits(read)

    def _step(self, embedded: Tensor, hidden: Tensor, positions: Tensor, sees: Tensor) -> Tensor:
        cache: Any = self.entries
        inputs = self.drafter.layer_inputs(self.target, embedded, positions, sees, cache)
        return self.drafter.step(embedded, hidden, inputs)

    def _head_input(self, out: Float[Tensor, "B m d"]) -> Float[Tensor, "B m d"]:
        with autocast_like(self.like):
            return self.drafter.head_input(out).to(self.like.dtype)

    def _logits(self, read: Float[Tensor, "B m d"]) -> Float[Tensor, "B m v"]:
        (head,) = self.drafter.draft_heads(self.target)
        return head(read.flatten(0, 1)).unflatten(0, read.shape[:2])


def _rows(states: Tensor, rows: Int[Tensor, "B m"]) -> Tensor:
    """Return these rows (B, m, c) of (B, n, c)."""
    return states.gather(1, rows.unsqueeze(2).expand(-1, -1, states.shape[2]))
