"""A batch's labels, positions and indices on the host, so that no step waits for the device.

An index by a boolean mask, `nonzero`, `int(tensor)` and `if tensor:` need a tensor's values on the
host. On a GPU the host then waits until the device has done all that it was sent, and the device
has nothing to do until the host continues. Labels and positions are known before a batch leaves the
host, so indices are made from them there, and sent without waiting.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F

UNTRAINED = -100  # the label of a position whose token is not trained
# Keys that Collate adds for all rows of a batch together. A part of the batch must not have them.
OF_WHOLE_BATCH = ("supervised", "row_bounds", "host")


class Host:
    """The labels and positions of a batch, on the host. Lightning moves no object of this class to
    a device.

    labels     (B, T) int64, as trainer.data.batches.Collate makes them
    positions  (B, T) int64, from 0 in each row
    lengths    the tokens of each sequence before its padding; None if they are not known
    several    whether a sequence has more than one row; padding of packed sequences counts as rows
    longest    tokens of the longest row, if there is more than one in a sequence
    """

    def __init__(
        self,
        labels: Int[Tensor, "B T"],
        positions: Int[Tensor, "B T"] | None = None,
        lengths: list[int] | None = None,
        several: bool = False,
        longest: int = 0,
    ):
        self.labels, self.lengths = labels, lengths
        self.several, self.longest = several, longest
        if positions is None:
            positions = torch.arange(labels.shape[1]).expand_as(labels)
        self.positions = positions


def host_of(batch: dict[str, Any]) -> Host:
    """Return a batch's Host. For a batch without one it is made, which waits for the device."""
    if "host" in batch:
        return batch["host"]
    positions = batch.get("position_ids")
    return Host(batch["labels"].cpu(), None if positions is None else positions.cpu())


def supervised_positions(labels: Int[Tensor, "B T"]) -> Int[Tensor, " n"]:
    """Return b T + t of each position t whose next token is trained, ascending, int64."""
    return flat(F.pad(labels[:, 1:], (0, 1), value=UNTRAINED) != UNTRAINED)


def supervised(batch: dict[str, Any]) -> Int[Tensor, " n"]:
    """Return the `supervised_positions` that a batch brings, or those of its labels."""
    return batch["supervised"] if "supervised" in batch else supervised_positions(batch["labels"])


def flat(mask: Bool[Tensor, "*b"]) -> Int[Tensor, " n"]:
    """Return the indices into a mask's flattened entries that are True, ascending, int64."""
    return mask.flatten().nonzero()[:, 0]


def picked(values: Tensor, at: Int[Tensor, " n"]) -> Tensor:
    """Return the entries of (B, T, *c) values at flat indices b T + t, (n, *c)."""
    return values.flatten(0, 1).index_select(0, at)


def placed(values: Tensor, at: Int[Tensor, " n"], shape: torch.Size) -> Tensor:
    """Return a (B, T) tensor with (n,) values at flat indices b T + t, and 0 elsewhere."""
    return values.new_zeros(shape).view(-1).index_copy_(0, at, values).view(shape)


def count(at: Int[Tensor, " n"]) -> Int[Tensor, ""]:
    """Return n as a tensor on the device of the indices."""
    return at.new_full((), len(at))


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on `device`, without waiting for what the device does."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def all_sent(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors of the host on `device`, as `sent` does."""
    return tuple(sent(tensor, device) for tensor in tensors)


def offset_mask(
    offset: int, labels: Int[Tensor, "B T"], positions: Int[Tensor, "B T"]
) -> Bool[Tensor, "B T"]:
    """Return which positions t have a target of a drafter's offset: the token x_{t+1+offset} is
    trained and in the same row."""
    ahead = offset + 1
    where = torch.zeros_like(labels, dtype=torch.bool)
    if labels.shape[1] > ahead:
        same = positions[:, ahead:] == positions[:, :-ahead] + ahead
        where[:, :-ahead] = same & (labels[:, ahead:] != UNTRAINED)
    return where
