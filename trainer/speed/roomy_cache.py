"""A layer of transformers' cache with room for the tokens to come."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """A DynamicLayer whose keys and values are the start of larger tensors, so that a pass writes
    its own alone. DynamicLayer copies all of them, for every pass."""

    room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        count = key_states.shape[2]
        self.lengthen(count)
        assert self.keys is not None
        assert self.values is not None
        self.keys[:, :, -count:] = key_states
        self.values[:, :, -count:] = value_states
        return self.keys, self.values

    def lengthen(self, count: int) -> None:
        """Add `count` entries, at least one, that are not written yet."""
        assert self.keys is not None
        assert self.values is not None
        end = self.keys.shape[2] + count
        # Others may have put tensors of their own in place.
        if self.room is None or not _starts(self.keys, self.room[0], end):
            self.room = _larger(self.keys, end), _larger(self.values, end)
        elif not _starts(self.values, self.room[1], end):
            self.room = self.room[0], _larger(self.values, end)
        self.keys, self.values = (room[:, :, :end] for room in self.room)


def _starts(entries: Tensor, room: Tensor, end: int) -> bool:
    """Return whether `entries` are the first ones of `room`, which holds `end`."""
    return (
        entries.data_ptr() == room.data_ptr()
        and entries.shape[:2] == room.shape[:2]
        and end <= room.shape[2]
    )


def _larger(entries: Tensor, end: int) -> Tensor:
    """Return a tensor that begins with `entries` and has room for half as many again."""
    B, H, count, d = entries.shape
    room = torch.empty(B, H, end + max(64, end // 2), d, dtype=entries.dtype, device=entries.device)
    room[:, :, :count] = entries
    return room


def roomy(cache: DynamicCache) -> DynamicCache:
    """Let an empty cache have room, in all its layers that keep every token's entries."""
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = RoomyLayer
    cache.layers = [
        RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache
