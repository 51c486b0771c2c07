"""Token Recycling (Luo et al. 2024, arXiv 2408.08696): the target's own runners-up, stored until
their token occurs again.

    M (V, k) int32: row v holds the k most likely tokens after v, best first, as the target last
        computed them; -1 if it never did
    after each pass of the target: M[v] = top-k of its logits after v, for all v that it read,
        including refused drafts
    draft: the node of rank r below a node v is M[v, r], in a tree of fixed shape

Nothing is trained. k = 8 and 80 nodes are the paper's, and 8 V tokens of four bytes are less than 2
MB for a vocabulary of 49,152. The paper only draws its tree. This one holds the nodes most likely
to be reached if the candidate of rank r = 1, 2 .. is right with probability 0.45 r^-1.3. M is
nodes_by_cost from one sequence to the next, as in the paper.
"""

from __future__ import annotations

import heapq
import math

import torch
from jaxtyping import Int
from torch import Tensor

from trainer.drafters import Draft, DrafterError, Target, TargetUpdate, TreeBuilder
from trainer.drafters.untrained import Untrained


class TokenRecycling(Untrained):
    """Trees of up to `nodes` tokens in up to `depth` levels, for targets with V tokens. They are
    chosen without chance, and the shape is not used.

    Raises:
        DrafterError: a number is less than 1.
    """

    def __init__(self, vocabulary: int, nodes: int = 80, candidates: int = 8, depth: int = 6):
        for name, value in (("nodes", nodes), ("candidates", candidates), ("depth", depth)):
            if value < 1:
                raise DrafterError(f"{name}={value}: a tree of recycled tokens has at least 1")
        super().__init__(depth)
        self.candidates = min(candidates, vocabulary)
        # Always on the CPU: a tree is read from it node by node.
        self.following: Int[Tensor, "V k"] = torch.full(
            (vocabulary, self.candidates), -1, dtype=torch.int32
        )
        self.levels = levels(nodes, self.candidates, depth)

    def start(self, target: Target) -> None:
        return None

    @torch.no_grad()
    def propose(
        self, memory: None, target: Target, update: TargetUpdate, build: TreeBuilder
    ) -> Draft:
        if update.tried is not None:
            self._take(*update.tried)
        tokens: list[int] = []
        parents: list[int] = []
        # One level's tokens and node numbers; None if the token's successors are unknown.
        above: list[tuple[int, int] | None] = [(int(update.ids[-1]), -1)]
        for shape in self.levels:
            below: list[tuple[int, int] | None] = []
            rows = [None if node is None else self.following[node[0]].tolist() for node in above]
            for parent, rank in shape:
                row, node = rows[parent], above[parent]
                if row is None or node is None or row[rank] < 0:
                    below.append(None)
                    continue
                below.append((row[rank], len(tokens)))
                tokens.append(row[rank])
                parents.append(node[1])
            above = below
        return Draft(
            torch.tensor(tokens, dtype=torch.long, device=update.ids.device),
            torch.tensor(parents, dtype=torch.long),
        )

    def _take(self, tokens: Tensor, logits: Tensor) -> None:
        # Of equal tokens the last one counts.
        last = {token: row for row, token in enumerate(tokens.tolist())}
        best = logits.topk(self.candidates, dim=-1).indices.to(self.following)
        self.following[list(last)] = best[list(last.values())]


def levels(nodes: int, candidates: int, depth: int) -> list[list[tuple[int, int]]]:
    """Return the tree's shape, level by level: for each node its parent's index in the level above,
    and its rank among its siblings, from 0. Parents and better siblings of a node are in the tree
    too."""
    chances = [math.log(0.45) - 1.3 * math.log(rank) for rank in range(1, candidates + 1)]
    # A node is its path of ranks. It is reached with the product of their probabilities. A step
    # adds its first child and next sibling.
    waiting: list[tuple[float, tuple[int, ...]]] = [(-chances[0], (0,))]
    nodes_by_cost: list[tuple[int, ...]] = []
    while waiting and len(nodes_by_cost) < nodes:
        cost, path = heapq.heappop(waiting)
        nodes_by_cost.append(path)
        if len(path) < depth:
            heapq.heappush(waiting, (cost - chances[0], (*path, 0)))
        if (rank := path[-1] + 1) < candidates:
            heapq.heappush(waiting, (cost + chances[rank - 1] - chances[rank], (*path[:-1], rank)))
    shape: list[list[tuple[int, int]]] = []
    above: list[tuple[int, ...]] = [()]
    for length in range(1, depth + 1):
        level = sorted(path for path in nodes_by_cost if len(path) == length)
        if level:
            shape.append([(above.index(path[:-1]), path[-1]) for path in level])
        above = level
    return shape
