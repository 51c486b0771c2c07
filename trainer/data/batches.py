"""The rows of each micro-batch: a function of the seed and the number of the step alone.

The order of the sequences in epoch e depends on (seed, e) only, and epochs follow each other
without a gap. With a Subset an epoch has only some of them. A step takes the next
batch_size x accumulate x ranks of them. So a run can start anywhere, and a resumed run sees exactly
the rows that it would have seen. The last step of the last
epoch may be smaller: each row is used exactly as often as `max_epochs` says.
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
from trainer.data.subset import Subset
from trainer.models.on_host import Host, flat, supervised_positions
from trainer.speed import flash


@dataclass(frozen=True)
class Pick:
    """A sequence of a micro-batch. `trains` is False for a filler, which only gives a rank as many
    sequences as the others have."""

    sequence: int
    trains: bool
    # trained tokens of the whole step, over all micro-batches and ranks, times their rows' weights
    window_tokens: float


class BatchOrder:
    """The order of a run's sequences, and its length in steps.

    `lengths` and `trained` are the tokens and the trained tokens of each sequence. With
    `epochs` = None the order has no end.
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
        subset: Subset | None = None,
    ):
        self.lengths, self.trained, self.seed = lengths, trained, seed
        self.batch_size, self.accumulate, self.ranks = batch_size, accumulate, ranks
        self.group_by_length = group_by_length
        self.per_step = batch_size * accumulate * ranks
        self.subset = subset
        self.per_epoch = len(lengths) if subset is None else subset.size
        self.sequences = round(self.per_epoch * epochs) if epochs is not None else 1 << 62
        # (step, count): from this step on, rows of so many steps more are skipped
        self.skips: list[tuple[int, int]] = []
        self._order = functools.lru_cache(maxsize=2)(self._make_order)

    def steps(self, steps: int | None, tokens: int | None, after: int = 0) -> int:
        """Return the number of optimiser steps until the first limit: the epochs, `steps`, or the
        step in which `tokens` are reached. Those before `after` do not count."""
        limit = -(-self.sequences // self.per_step) - after
        if steps is not None:
            limit = min(limit, steps)
        if tokens is not None:
            seen = step = 0
            while seen < tokens and step < limit:
                seen += self._tokens(after + step)
                step += 1
            limit = step
        return limit

    def extend(self, steps: int) -> None:
        """Let the order have further sequences after its epochs, for as many steps."""
        self.sequences += steps * self.per_step

    def last_steps(self, tokens: int, steps: int) -> int:
        """Return how many of the last of `steps` steps have at least `tokens` tokens together; all
        of them if they have fewer."""
        seen = count = 0
        while seen < tokens and count < steps:
            count += 1
            seen += self._tokens(steps - count)
        return count

    def _tokens(self, step: int) -> int:
        sequences = [sequence for sequence, trains in self.window(step) if trains]
        return int(self.lengths[sequences].sum())

    def members(self, epoch: int) -> np.ndarray:
        """Return the sequences that an epoch sees."""
        return np.arange(len(self.lengths)) if self.subset is None else self.subset.of(epoch)

    def _make_order(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self.members(epoch))
        if not self.group_by_length:
            return order
        # Among the rows of 50 random batches, those of similar length share a batch; then the
        # batches are shuffled.
        span = 50 * self.batch_size
        parts = [order[i : i + span] for i in range(0, len(order), span)]
        ordered = np.concatenate(
            [part[np.argsort(-self.lengths[part], kind="stable")] for part in parts]
        )
        full = len(ordered) // self.batch_size * self.batch_size
        batches = ordered[:full].reshape(-1, self.batch_size)
        return np.concatenate([batches[rng.permutation(len(batches))].reshape(-1), ordered[full:]])

    def at(self, position: int) -> int:
        """Return the sequence at a position of the endless order."""
        epoch, offset = divmod(position, self.per_epoch)
        return int(self._order(epoch)[offset])

    def window(self, step: int, skipped: int = 0) -> list[tuple[int, bool]]:
        """Return (sequence, whether it trains) for all of one step: micro-batch by micro-batch, and
        in each of them rank by rank. The rows of `skipped` steps before it are left out: the order
        continues into the next epoch instead."""
        first = (step + skipped) * self.per_step
        last = min(first + self.per_step, self.sequences + skipped * self.per_step)
        real = [(self.at(position), True) for position in range(first, last)]
        # In a smaller last step, too, every rank must have the same number of micro-batches.
        group = self.batch_size * self.ranks
        missing = -len(real) % group if self.ranks > 1 else 0
        return real + [(real[0][0], False)] * missing

    def micro_batches(self, step: int, rank: int = 0) -> list[list[Pick]]:
        """Return the micro-batches of one step for one rank."""
        window = self.window(step, sum(count for at, count in self.skips if step >= at))
        tokens = sum(self.trained[sequence].item() for sequence, trains in window if trains)
        group = self.batch_size * self.ranks
        batches = []
        for start in range(0, len(window), group):
            shares = window[start : start + group]
            # Of a smaller group, ranks take equal shares.
            share = -(-len(shares) // self.ranks)
            batches.append(
                [
                    Pick(sequence, trains, tokens)
                    for sequence, trains in shares[rank * share : (rank + 1) * share]
                ]
            )
        return batches

    def positions(self, step: int) -> int:
        """Return the number of sequences that the first `step` steps use."""
        return min(step * self.per_step, self.sequences)


class Batches(Sampler):
    """The micro-batches of steps `start` to `stop` for one rank, a sampler for torch's DataLoader.

    `len` counts from step 0: Lightning compares it with the number of micro-batches that it
    restores from a checkpoint.
    """

    def __init__(self, order: BatchOrder, start: int, stop: int, rank: int):
        self.order, self.start, self.stop, self.rank = order, start, stop, rank

    def __len__(self) -> int:
        if self.stop == 0:
            return 0
        last = self.order.micro_batches(self.stop - 1, self.rank)
        return (self.stop - 1) * self.order.accumulate + len(last)

    def __iter__(self) -> Iterator[list[Pick]]:
        for step in range(self.start, self.stop):
            yield from self.order.micro_batches(step, self.rank)


class Sequences(Dataset):
    """Rows, or packs of rows, that are looked up by a Pick."""

    def __init__(self, rows: Rows, packs: list[list[int]] | None = None):
        self.rows, self.packs = rows, packs

    def __len__(self) -> int:
        return len(self.packs) if self.packs is not None else len(self.rows)

    def members(self, sequence: int) -> list[int]:
        """Return the rows of a sequence."""
        return self.packs[sequence] if self.packs is not None else [sequence]

    def __getitem__(self, pick: Pick) -> tuple[Pick, list[Tokens]]:
        return pick, [self.rows[row] for row in self.members(pick.sequence)]

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of each sequence, and its trained ones times their rows' weights."""
        lengths, trained = self.rows.lengths, self.rows.trained
        if (weights := getattr(self.rows, "weights", None)) is not None:
            trained = trained * weights
        if self.packs is None:
            return lengths, trained
        return np.array([lengths[p].sum() for p in self.packs]), np.array(
            [trained[p].sum() for p in self.packs]
        )


@dataclass
class Collate:
    """Makes a batch of tensors from picked sequences.

    input_ids       (B, T) int64, padded on the right; T is a multiple of 8
    labels          (B, T) int64, the id of a trained token, -100 elsewhere
    position_ids    (B, T) int64, from 0 in each row, by which transformers keeps rows apart; only
                    with `packed`
    attention_mask  (B, T) int64; only with `labelled`
    token_type_ids  (B, T) int64; only of pairs of texts whose tokenizer makes them
    classes         (B,) int64, or of rows with `values` (B, C) fp32, NaN for a filler; only with
                    `labelled`
    weights         (B, T) fp32, that of each token's row; only with `weighted`
    lengths         (B,) int64, the tokens before the padding, 0 for a filler
    supervised      (n,) int64, trainer.models.on_host.supervised_positions of the labels; of rows
                    with `values` those that are no fillers
    row_bounds      (rows + 1,) int32, trainer.speed.flash.rows_of; only with `packed`
    host            trainer.models.on_host.Host, which stays on the host; not with `labelled`
    window_tokens, tokens (of this batch, without fillers) and sequences are plain numbers.

    With `decoder_start` (Base.decoder_start) a row is a pair. input_ids and attention_mask (B, S)
    are the encoder's, labels and decoder_input_ids (B, T) the decoder's, which start with that
    token; lengths (B,) and decoder_lengths (B,) count each side.
    """

    pad: int
    packed: bool
    labelled: bool
    decoder_start: int | None = None
    weighted: bool = False

    def __call__(self, items: Sequence[tuple[Pick, list[Tokens]]]) -> dict[str, Any]:
        if self.decoder_start is not None:
            batch = self._pairs(items)
            return batch | {"supervised": supervised_positions(batch["labels"])}
        batch = self._numbers(items) | self._sequences(items)
        return batch | (_rows_with_values(batch) if self.labelled else _known(batch))

    def _numbers(self, items: Sequence[tuple[Pick, list[Tokens]]]) -> dict[str, Any]:
        return {
            "window_tokens": items[0][0].window_tokens,
            "tokens": sum(len(row.ids) for pick, rows in items if pick.trains for row in rows),
            "sequences": [pick.sequence for pick, _ in items],
        }

    def _pairs(self, items: Sequence[tuple[Pick, list[Tokens]]]) -> dict[str, Any]:
        assert self.decoder_start is not None
        first = [row.trained.index(True) for _, (row,) in items]
        read = [row.ids[:at] for at, (_, (row,)) in zip(first, items, strict=True)]
        written = [
            [self.decoder_start, *row.ids[at:]]
            for at, (_, (row,)) in zip(first, items, strict=True)
        ]
        trains = [pick.trains for pick, _ in items]
        labels = [
            [-100, *ids[1:]] if real else [-100] for ids, real in zip(written, trains, strict=True)
        ]
        width = max(map(len, written))
        lengths = [
            torch.tensor([len(ids) if real else 0 for ids, real in zip(side, trains, strict=True)])
            for side in (read, written)
        ]
        batch = self._numbers(items)
        if self.weighted:
            weights = [
                [row.weight] * len(ids) for ids, (_, (row,)) in zip(written, items, strict=True)
            ]
            batch["weights"] = _padded(weights, 0.0)
        return batch | {
            "input_ids": _padded(read, self.pad),
            "attention_mask": _padded([[1] * len(ids) for ids in read], 0),
            "decoder_input_ids": _padded(written, self.pad),
            "labels": _padded(labels, -100, width),
            "lengths": lengths[0],
            "decoder_lengths": lengths[1],
        }

    def _sequences(self, items: Sequence[tuple[Pick, list[Tokens]]]) -> dict[str, Any]:
        longest = max(sum(len(row.ids) for row in rows) for _, rows in items)
        width = -(-longest // 8) * 8  # matrix units work on multiples of 8
        shape = (len(items), width)
        input_ids = torch.full(shape, self.pad, dtype=torch.int64)
        labels = torch.full(shape, -100, dtype=torch.int64)
        position_ids = torch.zeros(shape, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        classes = torch.full((len(items),), -100, dtype=torch.int64)
        weights = torch.zeros(shape, dtype=torch.float32)
        for i, (pick, rows) in enumerate(items):
            at = 0
            for row in rows:
                ids, trained = torch.tensor(row.ids), torch.tensor(row.trained)
                here = slice(at, at + len(row.ids))
                input_ids[i, here] = ids
                position_ids[i, here] = torch.arange(len(row.ids))
                attention_mask[i, here] = 1
                weights[i, here] = row.weight
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
        }
        if self.packed:
            batch["position_ids"] = position_ids
        if self.labelled:
            values = [rows[0].values for _, rows in items]
            if values[0] is not None:
                classes = torch.tensor(values, dtype=torch.float32)
                classes[[i for i, (pick, _) in enumerate(items) if not pick.trains]] = torch.nan
            batch |= {"attention_mask": attention_mask, "classes": classes}
            types = [rows[0].types or [] for _, rows in items]
            if all(types):
                batch["token_type_ids"] = _padded(types, 0, width)
        if self.weighted:
            batch["weights"] = weights
        return batch


def _rows_with_values(batch: dict[str, Any]) -> dict[str, Any]:
    classes = batch["classes"]
    real = ~classes.isnan().any(-1) if classes.is_floating_point() else None
    return {} if real is None else {"supervised": flat(real)}


def _known(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch's indices and bounds, which nothing then has to read from a device."""
    labels, positions = batch["labels"], batch.get("position_ids")
    host = Host(labels, positions, batch["lengths"].tolist())
    known: dict[str, Any] = {"supervised": supervised_positions(labels), "host": host}
    if positions is not None:
        rows = flash.rows_of(positions)
        bounds, host.longest = rows["cu_seq_lens_q"], rows["max_length_q"]
        known["row_bounds"], host.several = bounds, len(bounds) > len(labels) + 1
    return known


def _padded(rows: list[list[Any]], value: float, width: int = 0) -> torch.Tensor:
    """Return rows as one matrix, filled with `value` on the right. Its width is a multiple of 8."""
    width = -(-max(width, *map(len, rows)) // 8) * 8  # matrix units work on multiples of 8
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])
