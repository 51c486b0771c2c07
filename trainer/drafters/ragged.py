"""Several sequences of different lengths in one pass of a drafter.

A row is padded on the right. Entry i of a row's keys and values is at place i, whatever the lengths
of other rows, and what a row's padding writes lies behind its length, where its next entries
overwrite it. So a place sees all places up to its own, and nothing is moved.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trainer.drafters import Target, TargetUpdate
from trainer.drafters.layers import layer_cache, rotations, window


class Entries:
    """Keys and values (B, H, S, c) of one attention layer. transformers uses it as a cache: a pass
    writes where `place` says, and reads the first `end` places."""

    keys: Tensor | None = None
    values: Tensor | None = None
    at: Int[Tensor, "B n"]
    end = 0

    def place(self, at: Int[Tensor, "B n"], end: int) -> None:
        """Set the places of the next pass."""
        self.at, self.end = at, end

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys = self._with_room(self.keys, keys)
        self.values = self._with_room(self.values, values)
        index = self.at[:, None, :, None]
        for whole, new in ((self.keys, keys), (self.values, values)):
            whole.scatter_(2, index.expand_as(new), new)
        return self.keys[:, :, : self.end], self.values[:, :, : self.end]

    def _with_room(self, old: Tensor | None, new: Tensor) -> Tensor:
        room = 0 if old is None else old.shape[2]
        if old is not None and room >= self.end:
            return old
        # Zeros: a masked place must not be NaN.
        whole = new.new_zeros(*new.shape[:2], max(self.end, 2 * room), new.shape[3])
        if old is not None:
            whole[:, :, :room] = old
        return whole

    def get_seq_length(self, *_: Any) -> int:
        return self.end

    def select(self, rows: Sequence[int]) -> None:
        """Drop all rows but these; one may come several times."""
        if self.keys is not None and self.values is not None:
            at = torch.tensor(rows, device=self.keys.device)
            self.keys, self.values = self.keys[at], self.values[at]

    def repeated(self, times: int) -> Entries:
        """Return a copy with each row this many times."""
        copied = copy.copy(self)
        if self.keys is not None:
            copied.select([row for row in range(len(self.keys)) for _ in range(times)])
        return copied


@dataclass
class RaggedMemory:
    """The memory of several sequences: how many of the target's states of each have been read, and
    each layer's entries at these."""

    layers: list[Entries]
    lengths: list[int]

    @classmethod
    def empty(cls, layers: int, count: int) -> RaggedMemory:
        """Return the memory of `count` sequences, of which nothing has been read."""
        return cls([Entries() for _ in range(layers)], [0] * count)

    def select(self, rows: Sequence[int]) -> None:
        self.lengths = [self.lengths[row] for row in rows]
        for entries in self.layers:
            entries.select(rows)

    def read(self, counts: Sequence[int], more: int, device: torch.device) -> Places:
        """Count `counts` more states of each sequence as read. Return the places of a pass over
        them and `more` further ones."""
        places = places_from(self.lengths, max(counts) + more, device)
        for entries in self.layers:
            entries.place(places.at, places.end)
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        return places


@dataclass(frozen=True)
class Places:
    """The places of a pass over rows."""

    at: Int[Tensor, "B n"]  # also their positions
    sees: Bool[Tensor, "B n S"]
    end: int  # S

    def within(self, reach: int | None) -> Bool[Tensor, "B n S"]:
        """Return what places see in a sliding window of `reach` places, None for all."""
        if reach is None:
            return self.sees
        return self.sees & (
            self.at.unsqueeze(2) - torch.arange(self.end, device=self.at.device) < reach
        )


def places_from(starts: Sequence[int], count: int, device: torch.device) -> Places:
    """Return `count` places of each row, from `starts` on, that see all places up to themselves."""
    first = torch.tensor(starts).to(device, non_blocking=True).unsqueeze(1)
    at = first + torch.arange(count, device=device)
    end = max(starts) + count
    return Places(at, torch.arange(end, device=device) <= at.unsqueeze(2), end)


@dataclass(frozen=True)
class Updates:
    """The updates of B sequences, padded on the right to n positions."""

    hidden: Float[Tensor, "B n d"]
    features: Float[Tensor, "B n f"]
    ids: Int[Tensor, "B n"]
    counts: list[int]

    def newest(self, states: Float[Tensor, "B n c"]) -> Float[Tensor, "B c"]:
        """Return each row's states at its last position."""
        last = torch.tensor(self.counts).to(states.device, non_blocking=True) - 1
        return states[torch.arange(len(last), device=states.device), last]


def padded(updates: Sequence[TargetUpdate]) -> Updates:
    """Return several sequences' updates as one."""
    hidden, features, ids = (
        pad_sequence(parts, batch_first=True)
        for parts in (
            [update.hidden for update in updates],
            [update.features for update in updates],
            [update.ids for update in updates],
        )
    )
    return Updates(hidden, features, ids, [len(update.ids) for update in updates])


def ragged_inputs(
    target: Target, hidden: Float[Tensor, "B n d"], places: Places, entries: Entries
) -> dict[str, Any]:
    """Return a `decoder_layer`'s inputs besides `hidden`, as layers.layer_inputs does."""
    entries.place(places.at, places.end)
    mask = places.within(window(target)).unsqueeze(1)
    if target.config._attn_implementation != "sdpa":
        mask = hidden.new_zeros(mask.shape).masked_fill(~mask, torch.finfo(hidden.dtype).min)
    return {
        "attention_mask": mask,
        "position_ids": places.at,
        **layer_cache(target, entries),
        "position_embeddings": rotations(target, hidden, places.at),
    }


class IndependentBatch:
    """independent.IndependentGrowth of several sequences: `logits` returns those of an offset
    (B, V)."""

    branches = True
    vocabulary: Int[Tensor, " v"] | None = None
    confidence: Float[Tensor, "B m"] | None = None

    def __init__(self, offsets: int, logits: Callable[[int], Float[Tensor, "B V"]]):
        self.depth, self._logits = offsets, functools.cache(torch.no_grad()(logits))
        self._level = 1

    @classmethod
    def read(
        cls, head: Callable[[Tensor], Tensor], states: Float[Tensor, "B K d"]
    ) -> IndependentBatch:
        """Return the growth of K offsets by what the head reads at each, in one call."""
        logits = functools.cache(lambda: head(states))
        return cls(states.shape[1], lambda k: logits()[:, k - 1])

    def first(self) -> Float[Tensor, "B V"]:
        return self._logits(1)

    def extend(
        self, tokens: Int[Tensor, "B m"], parents: Int[Tensor, "B m"]
    ) -> Float[Tensor, "B m V"]:
        self._level += 1  # trees grow level by level
        return self._logits(self._level).unsqueeze(1).expand(-1, tokens.shape[1], -1)
