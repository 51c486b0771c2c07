"""The trees of several sequences that EAGLE's heads (trainer.drafters.unrolled) grow together."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from trainer.drafters import Target
from trainer.drafters.layers import autocast_like, window
from trainer.drafters.ragged import RaggedMemory, Updates


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
        self.longest = max(memory.lengths)
        self.base = torch.tensor(memory.lengths).to(device, non_blocking=True).unsqueeze(1)
        # which nodes each node sees
        self.above = torch.zeros(len(out), 0, 0, dtype=torch.bool, device=device)
        # of the newest token, then of the nodes
        self.depths = torch.zeros(len(out), 1, dtype=torch.long, device=device)
        self.head_inputs = self._head_input(out)
        self.root = self._logits(self.head_inputs)[:, 0]
        self.next_inputs = drafter.next_input(out)  # (B, 1 + nodes, d)

    def first(self) -> Float[Tensor, "B v"]:
        return self.root

    @torch.no_grad()
    def extend(
        self, tokens: Int[Tensor, "B m"], parents: Int[Tensor, "B m"]
    ) -> Float[Tensor, "B m v"]:
        drafter, target, old = self.drafter, self.target, self.above.shape[1]
        new, device = tokens.shape[1], tokens.device
        above = torch.eye(new, old + new, dtype=torch.bool, device=device).roll(old, dims=1)
        above = above.repeat(len(tokens), 1, 1)
        if old:
            # A child of the newest token sees no other node.
            inherited = _rows(self.above, parents.clamp_min(0)) & (parents >= 0).unsqueeze(2)
            above[..., :old] |= inherited
        depths = self.depths.gather(1, parents + 1) + 1
        self.above = torch.cat([F.pad(self.above, (0, new)), above], dim=1)
        self.depths = torch.cat([self.depths, depths], dim=1)
        at = self.base + torch.arange(old, old + new, device=device)
        self.entries.place(at, self.longest + old + new)
        embedded = drafter.in_own_dtype(target.embed(tokens))
        with autocast_like(self.like):
            out = self._step(
                embedded,
                _rows(self.next_inputs, parents + 1),
                self.base - 1 + depths,
                self._sees(above, depths),
            )
            self.next_inputs = torch.cat([self.next_inputs, drafter.next_input(out)], dim=1)
        read_above = _rows(self.head_inputs, parents + 1)
        predicted = drafter.predicted(1, read_above.flatten(0, 1))
        self.confidence = None if predicted is None else predicted.unflatten(0, tokens.shape)
        read = self._head_input(out)
        self.head_inputs = torch.cat([self.head_inputs, read], dim=1)
        return self._logits(read)

    def _sees(
        self, above: Bool[Tensor, "B m n"], depths: Int[Tensor, "B m"]
    ) -> Bool[Tensor, "B m S"]:
        """Return which places new nodes see: those of the row, and their ancestors'."""
        places = torch.arange(self.entries.end, device=above.device)
        node = places - self.base  # which node is at a place, below 0 for none
        inside = (node >= 0) & (node < above.shape[2])
        index = node.clamp(0, above.shape[2] - 1)
        sees = above.gather(2, index.unsqueeze(1).expand(-1, above.shape[1], -1))
        sees = (sees & inside.unsqueeze(1)) | (node < 0).unsqueeze(1)
        if (reach := window(self.drafter.around(self.target))) is not None:
            of_node = self.base - 1 + self.depths[:, 1:].gather(1, index)
            position = torch.where(inside, of_node, places)
            ahead = (self.base - 1 + depths).unsqueeze(2) - position.unsqueeze(1)
            sees = sees & (ahead < reach)
        return sees

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
