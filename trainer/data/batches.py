"""Which rows each micro-batch holds: a pure function of the seed and its number.

The sequences of epoch e come in an order that depends on (seed, e) only; epochs follow each other
without a gap. A step takes the next batch_size x accumulate x ranks of them. So a run can start
anywhere, and a run that goes on sees exactly what it would have seen. The last step of the last
epoch may be smaller: each row is used exactly as often as asked.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from trainer.data.render import Tokens
from trainer.data.rows import Rows


@dataclass(frozen=True)
class Pick:
    """A sequence of a micro-batch. `trains` is False for a filler, which only gives a rank as many
    sequences as the others have."""

    sequence: int
    trains: bool
    window_tokens: int  # trained tokens of the whole step, over all micro-batches and ranks


class BatchOrder:
    """The order of a run's sequences, and its length in steps.

    `lengths` and `trained` are tokens and trained tokens of each sequence; `epochs` None goes round
    without end.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        trained: np.ndarray,
        seed: int,
        batch_size: int,
        accumulate: int,
        ranks: int = 1,
        group_by_length: bool = False,
        epochs: float | None = None,
    ):
        self.lengths, self.trained, self.seed = lengths, trained, seed
        self.batch_size, self.accumulate, self.ranks = batch_size, accumulate, ranks
        self.group_by_length = group_by_length
        self.per_step = batch_size * accumulate * ranks
        self.sequences = round(len(lengths) * epochs) if epochs is not None else 1 << 62
        self._order = functools.lru_cache(maxsize=2)(self._make_order)

    def steps(self, steps: int | None, tokens: int | None) -> int:
        """Optimiser steps until the first limit: the epochs, `steps`, or the step in which `tokens`
        are reached."""
        limit = -(-self.sequences // self.per_step)
        if steps is not None:
            limit = min(limit, steps)
        if tokens is not None:
            seen = step = 0
            while seen < tokens and step < limit:
                seen += int(
                    self.lengths[
                        [sequence for sequence, counts in self.window(step) if counts]
                    ].sum()
                )
                step += 1
            limit = step
        return limit

    def last_steps(self, tokens: int, steps: int) -> int:
        """How many of the last of `steps` steps have at least `tokens` tokens together; all if even
        those have less."""
        seen = count = 0
        while seen < tokens and count < steps:
            count += 1
            seen += int(
                self.lengths[
                    [sequence for sequence, counts in self.window(steps - count) if counts]
                ].sum()
            )
        return count

    def _make_order(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths))
        if not self.group_by_length:
            return order
        # Within 50 batches' worth of random rows, those of similar length share a batch; the
        # batches are shuffled again.
        span = 50 * self.batch_size
        parts = [order[i : i + span] for i in range(0, len(order), span)]
        ordered = np.concatenate(
            [part[np.argsort(-self.lengths[part], kind="stable")] for part in parts]
        )
        full = len(ordered) // self.batch_size * self.batch_size
        batches = ordered[:full].reshape(-1, self.batch_size)
        return np.concatenate([batches[rng.permutation(len(batches))].reshape(-1), ordered[full:]])

    def at(self, position: int) -> int:
        """The sequence at a position of the endless order."""
        epoch, offset = divmod(position, len(self.lengths))
        return int(self._order(epoch)[offset])

    def window(self, step: int) -> list[tuple[int, bool]]:
        """(sequence, whether it counts) of one step: micro-batch by micro-batch, within each rank
        by rank."""
        first = step * self.per_step
        last = min(first + self.per_step, self.sequences)
        real = [(self.at(position), True) for position in range(first, last)]
        # A smaller last step still has every rank take part in the same number of micro-batches.
        group = self.batch_size * self.ranks
        missing = -len(real) % group if self.ranks > 1 else 0
        return real + [(real[0][0], False)] * missing

    def micro_batches(self, step: int, rank: int = 0) -> list[list[Pick]]:
        """The micro-batches of one step for one rank."""
        window = self.window(step)
        tokens = sum(int(self.trained[sequence]) for sequence, counts in window if counts)
        group = self.batch_size * self.ranks
        batches = []
        for start in range(0, len(window), group):
            shares = window[start : start + group]
            # Ranks take equal shares of what is there.
            share = -(-len(shares) // self.ranks)
            batches.append(
                [
                    Pick(sequence, counts, tokens)
                    for sequence, counts in shares[rank * share : (rank + 1) * share]
                ]
            )
        return batches

    def positions(self, step: int) -> int:
        """Sequences used by the first `step` steps."""
        return min(step * self.per_step, self.sequences)


class Batches(Sampler):
    """The micro-batches of steps `start` to `stop` for one rank, as torch's DataLoader takes them.
    `len` counts from step 0, since Lightning compares it with the micro-batches that it
    remembers."""

    def __init__(self, plan: BatchOrder, start: int, stop: int, rank: int):
        self.plan, self.start, self.stop, self.rank = plan, start, stop, rank

    def __len__(self) -> int:
        if self.stop == 0:
            return 0
        return (self.stop - 1) * self.plan.accumulate + len(
            self.plan.micro_batches(self.stop - 1, self.rank)
        )

    def __iter__(self) -> Iterator[list[Pick]]:
        for step in range(self.start, self.stop):
            yield from self.plan.micro_batches(step, self.rank)


class Sequences(Dataset):
    """Rows, or packs of rows, by Pick."""

    def __init__(self, rows: Rows, packs: list[list[int]] | None = None):
        self.rows, self.packs = rows, packs

    def __len__(self) -> int:
        return len(self.packs) if self.packs is not None else len(self.rows)

    def members(self, sequence: int) -> list[int]:
        """The rows of a sequence."""
        return self.packs[sequence] if self.packs is not None else [sequence]

    def __getitem__(self, pick: Pick) -> tuple[Pick, list[Tokens]]:
        return pick, [self.rows[row] for row in self.members(pick.sequence)]

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and trained tokens of each sequence."""
        if self.packs is None:
            return self.rows.lengths, self.rows.trained
        lengths, trained = self.rows.lengths, self.rows.trained
        return np.array([lengths[p].sum() for p in self.packs]), np.array(
            [trained[p].sum() for p in self.packs]
        )


@dataclass
class Collate:
    """Picked sequences to tensors.

    input_ids (B, T) int64, padded to the right; labels (B, T) int64, the id where a token is
    trained and -100 elsewhere;
    packed: position_ids (B, T) int64, from 0 for each row, by which transformers keeps the rows
    apart; labelled: attention_mask (B, T) int64 and classes (B,) int64. lengths (B,) int64: tokens
    before the padding, 0 for a sequence that only fills a rank's share. window_tokens and sequences
    are plain numbers.
    """

    pad: int
    packed: bool
    labelled: bool

    def __call__(self, items: Sequence[tuple[Pick, list[Tokens]]]) -> dict[str, Any]:
        longest = max(sum(len(row.ids) for row in rows) for _, rows in items)
        width = -(-longest // 8) * 8  # matrix units work in eights
        shape = (len(items), width)
        input_ids = torch.full(shape, self.pad, dtype=torch.int64)
        labels = torch.full(shape, -100, dtype=torch.int64)
        position_ids = torch.zeros(shape, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        classes = torch.full((len(items),), -100, dtype=torch.int64)
        for i, (pick, rows) in enumerate(items):
            at = 0
            for row in rows:
                ids, trained = torch.tensor(row.ids), torch.tensor(row.trained)
                here = slice(at, at + len(row.ids))
                input_ids[i, here] = ids
                position_ids[i, here] = torch.arange(len(row.ids))
                attention_mask[i, here] = 1
                if pick.trains:
                    labels[i, here] = torch.where(trained, ids, -100)
                    labels[i, at] = -100  # nothing predicts a row's first token
                    classes[i] = row.label
                at += len(row.ids)
        batch: dict[str, Any] = {
            "input_ids": input_ids,
            "labels": labels,
            "lengths": torch.tensor(
                [sum(len(row.ids) for row in rows) if pick.trains else 0 for pick, rows in items]
            ),
            "window_tokens": items[0][0].window_tokens,
            "tokens": sum(len(row.ids) for pick, rows in items if pick.trains for row in rows),
            "sequences": [pick.sequence for pick, _ in items],
        }
        if self.packed:
            batch["position_ids"] = position_ids
        if self.labelled:
            batch |= {"attention_mask": attention_mask, "classes": classes}
        return batch
