"""Rows of packed sequences as they are known on the host: whether a sequence has several, and where
they begin and end. Otherwise transformers and the attention of packed rows would read this from the
device in each pass of the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import masking_utils

from trainer.speed import flash


@contextlib.contextmanager
def of(batch: dict[str, Any]) -> Iterator[None]:
    """While open, the model runs on a batch of trainer.data.batches.Collate. One that has no `host`
    changes nothing."""
    host, positions = batch.get("host"), batch.get("position_ids")
    if host is None:
        yield
        return
    if positions is not None and "row_bounds" in batch:
        flash.remember(positions, batch["row_bounds"], host.longest)
    several = positions is not None and host.several
    own = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = row_numbers if several else _one_row
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = own


def row_numbers(position_ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Return the number of each token's row in its sequence, as transformers'
    find_packed_sequence_indices does where a sequence has several."""
    before = position_ids[:, :1] - 1
    return (torch.diff(position_ids, prepend=before, dim=-1) != 1).cumsum(-1)


def _one_row(position_ids: Tensor) -> None:
    """Return None, as find_packed_sequence_indices does where no sequence has several rows."""
