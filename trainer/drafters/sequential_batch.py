"""The trees of several sequences that modules one after another (trainer.drafters.sequential) grow
together.

Depth k of a sequence reads the positions whose x_{i+k} was not known before, so every row of a pass
has its own first position and its own number of positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trainer.drafters import Target
from trainer.drafters.layers import autocast_like
from trainer.drafters.ragged import RaggedMemory, places_from, ragged_inputs


@dataclass
class SequentialMemory:
    """sequential.Memory of several sequences; `waiting[k - 1]` has one entry for each."""

    depths: list[RaggedMemory]
    ids: list[Int[Tensor, " n"]]
    waiting: list[list[Float[Tensor, "m d"]]]

    def select(self, rows: Sequence[int]) -> None:
        for depth in self.depths:
            depth.select(rows)
        self.ids = [self.ids[row] for row in rows]
        self.waiting = [[states[row] for row in rows] for states in self.waiting]

    def settled(self, k: int) -> list[int]:
        """Return how many positions of each sequence have a known x_{i+k}."""
        return [max(0, len(ids) + 1 - k) for ids in self.ids]


@dataclass(frozen=True)
class Node:
    """The drafted tokens up to a node (t,), and h at the positions that these change."""

    path: Int[Tensor, " t"]
    states: Float[Tensor, "r d"]


class SequentialBatch:
    """A trainer.drafters.BatchGrowth, of sequential.SequentialGrowth's numbers."""

    branches = True
    vocabulary: Tensor | None = None
    confidence: Tensor | None = None

    def __init__(self, drafter: Any, memory: SequentialMemory, target: Target, like: Tensor):
        self.depth, self.drafter, self.memory = drafter.offsets, drafter, memory
        self.target, self.like = target, like
        none = memory.waiting[0][0][:0]
        self.root = Node(memory.ids[0][:0], none)
        self.nodes: list[list[Node]] = [[] for _ in memory.ids]

    def first(self) -> Float[Tensor, "B V"]:
        return self._run(1, [[self.root] for _ in self.nodes])[0][:, 0]

    def extend(
        self, tokens: Int[Tensor, "B m"], parents: Int[Tensor, "B m"]
    ) -> Float[Tensor, "B m V"]:
        above = parents.tolist()
        heads = [
            [nodes[i] if i >= 0 else self.root for i in rows]
            for nodes, rows in zip(self.nodes, above, strict=True)
        ]
        paths = [
            [
                Node(torch.cat([node.path, token.view(1)]), node.states)
                for node, token in zip(row, own, strict=True)
            ]
            for row, own in zip(heads, tokens, strict=True)
        ]
        logits, grown = self._run(len(paths[0][0].path) + 1, paths)
        for nodes, new in zip(self.nodes, grown, strict=True):
            nodes += new
        return logits

    @torch.no_grad()
    def _run(self, k: int, paths: list[list[Node]]) -> tuple[Tensor, list[list[Node]]]:
        """Run depth k after each of B x m paths. Return the logits of the token after each, and the
        paths with h_k at the positions that their tokens change."""
        memory, many = self.memory, len(paths[0])
        settled = memory.settled(k)
        if many > 1 and memory.depths[k - 1].lengths != settled:
            self._step(k, [[self.root] for _ in paths], settled)
        ends = [len(ids) for ids in memory.ids]
        rows, read = self._step(k, paths, ends)
        logits = self.target.head(read.to(self.like.dtype)).unflatten(0, (len(paths), many))
        nodes = iter(rows)
        return logits, [
            [Node(node.path, _last(next(nodes), end - known)) for node in row]
            for row, end, known in zip(paths, ends, settled, strict=True)
        ]

    def _step(
        self, k: int, paths: list[list[Node]], ends: list[int]
    ) -> tuple[list[Float[Tensor, "p d"]], Float[Tensor, "m d"]]:
        """Return, for each path, (h_k at the positions up to its sequence's end that depth k has
        not read, the head's input at the last of them). With one path for each sequence, keep
        those whose tokens are known."""
        drafter, memory, many = self.drafter, self.memory, len(paths[0])
        module, depth, waiting = drafter.module(k), memory.depths[k - 1], memory.waiting[k - 1]
        known, settled = depth.lengths, memory.settled(k)
        tokens, below, counts = [], [], []
        for row, nodes in enumerate(paths):
            for node in nodes:
                ids = torch.cat([memory.ids[row], node.path])
                tokens.append(ids[known[row] + k - 1 : ends[row] + k - 1])
                counts.append(ends[row] - known[row])
                below.append(torch.cat([waiting[row], node.states])[: counts[-1]])
        entries = depth.layers[0] if many == 1 else depth.layers[0].repeated(many)
        starts = [start for start in known for _ in range(many)]
        places = places_from(starts, max(counts), tokens[0].device)
        ids = pad_sequence(tokens, batch_first=True)
        embedded = drafter.in_own_dtype(self.target.embed(ids))
        hidden = pad_sequence(below, batch_first=True)
        with autocast_like(self.like):
            around = ragged_inputs(self.target, hidden, places, entries)
            states = module(embedded, hidden, around)
            last = torch.tensor(counts).to(states.device, non_blocking=True) - 1
            read = module.post_norm(states[torch.arange(len(last), device=last.device), last])
        if many == 1:
            for row, (old, new) in enumerate(zip(known, settled, strict=True)):
                waiting[row] = waiting[row][new - old :]
                if k < drafter.offsets:
                    above = memory.waiting[k]
                    above[row] = torch.cat([above[row], states[row, : new - old]])
            depth.lengths = settled
        return [own[:count] for own, count in zip(states, counts, strict=True)], read


def _last(states: Float[Tensor, "p d"], count: int) -> Float[Tensor, "r d"]:
    return states[len(states) - count :]
