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
    """The nodes of a tree so far. Their tokens are indices into the drafter's vocabulary until
    `ids` maps them to the target's."""

    def __init__(self, drawing: Drawing, vocabulary: Int[Tensor, " v"] | None):
        self.drawing, self.vocabulary = drawing, vocabulary
        self.tokens: list[Tensor] = []
        self.rows: list[Tensor] = []
        self.probabilities: list[Tensor] = []
        self.q: Tensor | None = None  # what the last children were drawn from
        self.count = 0  # rows of `probabilities`

    def children(
        self, logits: Float[Tensor, "m v"], width: int, best: bool, with_replacement: bool
    ) -> Int[Tensor, "m width"]:
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
        self.q = self.drawing.to_probabilities(logits)
        generator = self.drawing.generator
        if width > 1 and not with_replacement:
            # An exponential race gives draws without replacement in their order; tokens of
            # probability 0 come last.
            race = torch.empty_like(self.q).exponential_(generator=generator).clamp_min_(1e-30)
            return (self.q / race).topk(width, dim=-1).indices
        return torch.multinomial(self.q, width, replacement=True, generator=generator)

    def add(self, indices: Int[Tensor, " n"], rows: Int[Tensor, " n"] | None, count: int) -> None:
        """Add nodes, drawn from these rows of the `count` last distributions."""
        self.tokens.append(indices)
        if self.q is not None and rows is not None:
            self.rows.append(rows + self.count)
            self.probabilities.append(self.q)
            self.count += count

    def ids(self, indices: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Return the target's ids."""
        return indices if self.vocabulary is None else self.vocabulary[indices]

    def draft(self, parents: list[int], with_replacement: bool) -> Draft:
        """Return the finished tree."""
        tokens, above = self.ids(torch.cat(self.tokens)), torch.tensor(parents)
        if not self.rows:
            return Draft(tokens, above)
        q = torch.cat(self.probabilities)
        if self.vocabulary is not None:
            q = q.new_zeros(len(q), self.drawing.size).index_copy(1, self.vocabulary, q)
        return Draft(tokens, above, q, torch.cat(self.rows), with_replacement)


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
