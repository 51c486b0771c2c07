"""Drafts of the sequences of a batch: in one pass of the drafter for each level of their trees, or
one sequence after another."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from trainer.decoding.drawing import Drawing, empty_draft, up_to_depth
from trainer.decoding.fused import Fused
from trainer.decoding.growing import Shape, Together
from trainer.drafters import Draft, Drafter, Target, TargetUpdate
from trainer.drafters.untrained import Untrained

log = logging.getLogger("trainer")


@dataclass(frozen=True)
class Limit:
    """The depth of a sequence's tree, and the depth that its tokens are cut to afterwards."""

    depth: int
    cut: int | None = None


class OneByOne:
    """A drafter's memories of some sequences, which it drafts for one after another."""

    def __init__(self, drafter: Drafter, target: Target, shape: Shape, count: int):
        self.drafter, self.target, self.shape = drafter, target, shape
        self.memories: list[Any] = [drafter.start(target) for _ in range(count)]

    def select(self, rows: Sequence[int]) -> None:
        """Drop all sequences but these."""
        self.memories = [self.memories[row] for row in rows]

    def drafts(
        self, updates: Sequence[TargetUpdate], drawing: Drawing, limits: Sequence[Limit]
    ) -> list[Draft]:
        """Read each sequence's update and propose a tree for it. Those whose limit is 0 read
        nothing."""
        drafts = []
        for memory, update, limit in zip(self.memories, updates, limits, strict=True):
            if limit.depth < 1:
                drafts.append(empty_draft())
                continue
            build = partial(self.shape, drawing=replace(drawing, limit=limit.depth))
            draft = self.drafter.propose(memory, self.target, update, build)
            # A drafter that overrides `propose` may go deeper.
            drafts.append(draft if limit.cut is None else up_to_depth(draft, limit.cut))
        return drafts


class AllAtOnce:
    """A drafter's memory of several sequences, which it reads in one pass."""

    def __init__(self, drafter: Drafter, target: Target, shape: Together, memory: Any):
        self.drafter, self.target, self.shape, self.memory = drafter, target, shape, memory

    def select(self, rows: Sequence[int]) -> None:
        self.memory.select(rows)

    def drafts(
        self, updates: Sequence[TargetUpdate], drawing: Drawing, limits: Sequence[Limit]
    ) -> list[Draft]:
        depths = [limit.depth for limit in limits]
        if max(depths) < 1:
            return [empty_draft() for _ in depths]
        growth = self.drafter.grow_batch(self.memory, self.target, updates)
        return self.shape.together(growth, drawing, depths)


class Merged:
    """The drafts of the two parts of a `Fused` drafter, each drafting as it can."""

    def __init__(self, drafter: Fused, parts: Sequence[Any]):
        self.drafter, self.parts = drafter, parts

    def select(self, rows: Sequence[int]) -> None:
        for part in self.parts:
            part.select(rows)

    def drafts(
        self, updates: Sequence[TargetUpdate], drawing: Drawing, limits: Sequence[Limit]
    ) -> list[Draft]:
        first, second = (part.drafts(updates, drawing, limits) for part in self.parts)
        return [self.drafter.fused(*pair) for pair in zip(first, second, strict=True)]


Drafting = OneByOne | AllAtOnce | Merged


def drafting(drafter: Drafter, target: Target, shape: Shape, count: int) -> Drafting:
    """Return how a drafter drafts for `count` sequences of a target that can read trees. A line
    says if it is one after another, though the drafter computes something."""
    if isinstance(drafter, Fused) and count > 1:
        parts = [drafting(part, target, shape, count) for part in (drafter.first, drafter.second)]
        return Merged(drafter, parts)
    own = type(drafter)
    if count > 1 and isinstance(shape, Together) and _batches(own):
        memory = drafter.start_batch(target, count)
        if memory is not None:
            return AllAtOnce(drafter, target, shape, memory)
    if count > 1 and (own.propose is Drafter.propose or not isinstance(drafter, Untrained)):
        _warn(own.__name__)
    return OneByOne(drafter, target, shape, count)


def _batches(own: type[Drafter]) -> bool:
    """Return whether a class has a `grow_batch` of its own. One that it inherits is no longer right
    where the class replaces `grow` or `start`."""

    def place(name: str) -> int:
        return next(i for i, base in enumerate(own.__mro__) if name in vars(base))

    return own.propose is Drafter.propose and place("grow_batch") <= min(
        place("grow"), place("start")
    )


@functools.cache
def _warn(name: str) -> None:
    log.warning(
        "%s drafts for the sequences of a batch one after another: the target reads them in one"
        " pass, and the drafter does not. a smaller batch_size loses little",
        name,
    )
