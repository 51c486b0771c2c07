"""Trees of tokens as positions and masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def is_chain(parents: Sequence[int]) -> bool:
    """Return whether each node follows the one before."""
    return all(parent == node - 1 for node, parent in enumerate(parents))


def tree_positions(
    trees: Sequence[Sequence[int]], most: int
) -> tuple[Int[Tensor, "B N"], Bool[Tensor, "B N N"]]:
    """Return (depths, who sees whom) of the newest token, `most` - 1 nodes and, in shorter trees,
    padding that sees itself; N = `most`."""
    depths = [[0] * most for _ in trees]
    sees = [[[place == other for other in range(most)] for place in range(most)] for _ in trees]
    for depth, seen, parents in zip(depths, sees, trees, strict=True):
        for node, parent in enumerate(parents, 1):
            depth[node] = depth[parent + 1] + 1
            seen[node] = [*seen[parent + 1][:node], True, *seen[node][node + 1 :]]
    return torch.tensor(depths), torch.tensor(sees)
