"""Two drafters in one tree: what a head drafts, and what is copied from the text.

As the fusion of RASD (arXiv 2503.03434): common beginnings of the two drafts are merged, and one
pass of the target verifies all. Drawn siblings come first and copied ones after them, so the text
keeps the target's distribution (`trainer.decoding.traversal`).

Differs from the paper: nothing is retrieved from a store of other texts, and paths are not pruned
by the head's first distribution.
"""

from __future__ import annotations

from typing import Any

import torch

from trainer.decoding.target_cache import allow_trees
from trainer.drafters import Draft, Drafter, DrafterError, Target, TargetUpdate, TreeBuilder
from trainer.drafters.untrained import Untrained


def merge(first: Draft, second: Draft, nodes: int) -> Draft:
    """Return the union of two trees. `first` stays as it is, and nodes of `second`, which was
    chosen without chance, follow it as long as there are at most `nodes`."""
    tokens, parents = first.tokens.tolist(), first.parents.tolist()
    place: dict[tuple[int, int], int] = {}
    for node, key in enumerate(zip(parents, tokens, strict=True)):
        place.setdefault(key, node)
    image = {-1: -1}
    above = zip(second.parents.tolist(), second.tokens.tolist(), strict=True)
    for node, (parent, token) in enumerate(above):
        if parent not in image:
            continue
        key = (image[parent], token)
        if key not in place:
            if len(tokens) >= nodes:
                continue
            place[key] = len(tokens)
            tokens.append(token)
            parents.append(image[parent])
        image[node] = place[key]
    more = len(tokens) - len(first.tokens)
    rows = first.rows
    if rows is not None:
        rows = torch.cat([rows, rows.new_full((more,), -1)])
    return Draft(
        torch.tensor(tokens, dtype=torch.long, device=first.tokens.device),
        torch.tensor(parents, dtype=torch.long),
        first.probabilities if rows is not None else None,
        rows,
        first.with_replacement,
    )


class Fused(Untrained):
    """The tree of `first` with the tree of `second` merged into it, of at most `nodes` nodes if
    `first` has fewer.

    For targets that cannot read trees, the second one's chain where it is the longer, or else the
    first one's.

    Raises:
        DrafterError: `second` draws tokens by chance.
    """

    def __init__(self, first: Drafter, second: Drafter, nodes: int = 64):
        super().__init__(first.depth)
        self.first, self.second, self.nodes = first, second, nodes
        self.layers = first.layers
        self.trees = True

    def start(self, target: Target) -> tuple[Any, Any]:
        try:
            allow_trees(target)
        except DrafterError:
            self.trees = False
        return self.first.start(target), self.second.start(target)

    @torch.no_grad()
    def propose(
        self, memory: tuple[Any, Any], target: Target, update: TargetUpdate, build: TreeBuilder
    ) -> Draft:
        first = self.first.propose(memory[0], target, update, build)
        second = self.second.propose(memory[1], target, update, build)
        return self.fused(first, second)

    def fused(self, first: Draft, second: Draft) -> Draft:
        """Return one draft of the two parts' drafts.

        Raises:
            DrafterError: the second was drawn by chance.
        """
        if second.probabilities is not None:
            raise DrafterError(
                f"{type(self.second).__name__} draws tokens by chance: only look-ups are merged"
            )
        if not len(first.tokens):
            return second
        if not self.trees:
            return second if len(second.tokens) > len(first.tokens) else first
        return merge(first, second, max(self.nodes, len(first.tokens)))
