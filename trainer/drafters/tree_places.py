"""The nodes of the trees of several sequences, as places of their entries: node i of a sequence is
at place length + i, behind the text, and sees the text, its ancestors and itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Columns:
    """The m columns of a pass of B sequences over S places: nodes, text or positions behind it."""

    at: Int[Tensor, "B m"]
    positions: Int[Tensor, "B m"]
    keys: Int[Tensor, "B S"]  # the position of each place
    sees: Bool[Tensor, "B m S"]

    def within(self, reach: int | None) -> Bool[Tensor, "B m S"]:
        """Return what the nodes see in a sliding window of `reach` positions, None for all."""
        if reach is None:
            return self.sees
        return self.sees & (self.positions.unsqueeze(2) - self.keys.unsqueeze(1) < reach)


class TreePlaces:
    """The trees after texts of `lengths` entries. A node is at position length - 1 + its depth,
    which is 1 for a child of the newest token."""

    def __init__(self, lengths: Sequence[int], device: torch.device):
        self.longest = max(lengths)
        self.base = torch.tensor(lengths).to(device, non_blocking=True).unsqueeze(1)
        rows = len(lengths)
        # which nodes each node sees
        self.above = torch.zeros(rows, 0, 0, dtype=torch.bool, device=device)
        # of the newest token, then of the nodes
        self.depths = torch.zeros(rows, 1, dtype=torch.long, device=device)

    def add(self, parents: Int[Tensor, "B m"]) -> Columns:
        """Add nodes with these parents, -1 for the newest token."""
        (rows, new), old, device = parents.shape, self.above.shape[1], parents.device
        above = torch.eye(new, old + new, dtype=torch.bool, device=device).roll(old, dims=1)
        above = above.repeat(rows, 1, 1)
        if old:
            # A child of the newest token sees no other node.
            index = parents.clamp_min(0).unsqueeze(2).expand(-1, -1, old)
            above[..., :old] |= self.above.gather(1, index) & (parents >= 0).unsqueeze(2)
        depths = self.depths.gather(1, parents + 1) + 1
        self.above = torch.cat([F.pad(self.above, (0, new)), above], dim=1)
        self.depths = torch.cat([self.depths, depths], dim=1)
        at = self.base + torch.arange(old, old + new, device=device)
        places = torch.arange(self.longest + old + new, device=device)
        node = places - self.base  # which node is at a place, below 0 for none
        inside = (node >= 0) & (node < old + new)
        node = node.clamp(0, old + new - 1)
        sees = above.gather(2, node.unsqueeze(1).expand(-1, new, -1))
        sees = (sees & inside.unsqueeze(1)) | (places < self.base).unsqueeze(1)
        of_node = self.base - 1 + self.depths[:, 1:].gather(1, node)
        keys = torch.where(inside, of_node, places)
        return Columns(at, self.base - 1 + depths, keys, sees)
