"""From logits to a tree's nodes: drawn by chance, or the most likely tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trainer.decoding.sampling import ToProbabilities
from trainer.drafters import Draft, DrafterError


@dataclass(frozen=True)
class Drawing:
    """The choice of a tree's nodes: drawn from `to_probabilities` of the logits or, if that is
    None, the most likely tokens. No node is deeper than `limit`."""

    size: int  # V, the target's
    limit: int
    to_probabilities: ToProbabilities | None = None
    generator: torch.Generator | None = None


def empty_draft() -> Draft:
    """Return the tree without nodes."""
    none = torch.zeros(0, dtype=torch.long)
    return Draft(none, none)


class DrawnNodes:
    """The nodes so far of the trees of B sequences, the same number for each. Their tokens are
    indices into the drafter's vocabulary until `ids` maps them to the target's."""

    def __init__(self, drawing: Drawing, vocabulary: Int[Tensor, " v"] | None):
        self.drawing, self.vocabulary = drawing, vocabulary
        self.tokens: list[Tensor] = []
        self.rows: list[Tensor] = []
        self.probabilities: list[Tensor] = []
        self.q: Tensor | None = None  # what the last children were drawn from
        self.count = 0  # rows of `probabilities`

    def children(
        self, logits: Float[Tensor, "B m v"], width: int, best: bool, with_replacement: bool
    ) -> Int[Tensor, "B m width"]:
        """Choose `width` indices for each row, and remember what they were drawn from."""
        if width > logits.shape[-1]:
            raise DrafterError(
                f"the tree has {width} children of a node, and the drafter knows {logits.shape[-1]}"
                " tokens"
            )
        if self.drawing.to_probabilities is None or best:
            self.q = None
            if width > 1:
                return logits.topk(width, dim=-1).indices
            return logits.max(-1, keepdim=True).indices
        flat = self.drawing.to_probabilities(logits.flatten(0, 1))
        self.q = flat.unflatten(0, logits.shape[:2])
        generator = self.drawing.generator
        if width > 1 and not with_replacement:
            # An exponential race gives draws without replacement in their order; tokens of
            # probability 0 come last.
            race = torch.empty_like(self.q).exponential_(generator=generator).clamp_min_(1e-30)
            return (self.q / race).topk(width, dim=-1).indices
        drawn = torch.multinomial(flat, width, replacement=True, generator=generator)
        return drawn.unflatten(0, logits.shape[:2])

    def add(self, indices: Int[Tensor, "B n"], rows: Int[Tensor, " n"] | None, count: int) -> None:
        """Add nodes, drawn from these rows of the `count` last distributions."""
        self.tokens.append(indices)
        if self.q is not None and rows is not None:
            self.rows.append(rows + self.count)
            self.probabilities.append(self.q)
            self.count += count

    def ids(self, indices: Int[Tensor, "B n"]) -> Int[Tensor, "B n"]:
        """Return the target's ids."""
        return indices if self.vocabulary is None else self.vocabulary[indices]

    def drafts(self, parents: Sequence[Sequence[int]], with_replacement: bool) -> list[Draft]:
        """Return the finished trees. A sequence has as many of the nodes as `parents` has for
        it."""
        tokens = self.ids(torch.cat(self.tokens, dim=1))
        trees = [
            Draft(own[: len(above)], torch.tensor(above, dtype=torch.long))
            for own, above in zip(tokens, parents, strict=True)
        ]
        if not self.rows:
            return trees
        q, rows = torch.cat(self.probabilities, dim=1), torch.cat(self.rows)
        if self.vocabulary is not None:
            wide = q.new_zeros(*q.shape[:2], self.drawing.size)
            q = wide.index_copy(2, self.vocabulary, q)
        return [
            replace(
                tree,
                probabilities=own,
                rows=rows[: len(tree.tokens)],
                with_replacement=with_replacement,
            )
            for tree, own in zip(trees, q, strict=True)
        ]


def up_to_depth(draft: Draft, depth: int) -> Draft:
    """Return a tree without its nodes of a larger depth."""
    depths: list[int] = []
    for parent in draft.parents.tolist():
        depths.append(1 + (depths[parent] if parent >= 0 else 0))
    keep = [node for node, deep in enumerate(depths) if deep <= depth]
    if len(keep) == len(depths):
        return draft
    place = {node: index for index, node in enumerate(keep)} | {-1: -1}
    return replace(
        draft,
        tokens=draft.tokens[keep],
        parents=torch.tensor([place[int(draft.parents[node])] for node in keep], dtype=torch.long),
        rows=None if draft.rows is None else draft.rows[keep],
    )


def depth_of(parents: Sequence[int]) -> int:
    """Return the number of levels of a tree."""
    depths: list[int] = []
    for parent in parents:
        depths.append(1 + (depths[parent] if parent >= 0 else 0))
    return max(depths, default=0)
