"""A cache with room against transformers' own."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from trainer.speed.roomy_cache import RoomyLayer, roomy


def test_a_roomy_cache_holds_what_a_dynamic_one_holds():
    caches: list[Any] = [DynamicCache(), roomy(DynamicCache())]
    generator = torch.Generator().manual_seed(0)
    written = []
    for count, cropped in ((5, 0), (1, 1), (3, 2), (90, 40), (4, 0), (1, 0), (200, 0)):
        keys, values = torch.randn(2, 2, 3, count, 4, generator=generator)
        for cache in caches:
            cache.update(keys, values, 0)
        ours = caches[1].layers[0]
        written.append(ours.keys.data_ptr())
        for cache in caches:
            cache.crop(-cropped)
        if count == 3:
            for cache in caches:
                cache.batch_select_indices(torch.tensor([1, 0]))
        for name in ("keys", "values"):
            assert torch.equal(*(getattr(cache.layers[0], name) for cache in caches))
        assert caches[0].get_seq_length() == caches[1].get_seq_length()
    # only the selection and what went beyond the room were copied
    assert written[0] == written[1] == written[2]
    assert written[3] == written[4] == written[5]


def test_only_layers_that_keep_all_entries_have_room():
    cache = DynamicCache()
    cache.layers = [DynamicLayer(), RoomyLayer()]
    sliding = type("Sliding", (DynamicLayer,), {})()
    cache.layers.append(sliding)
    layers = roomy(cache).layers
    assert [type(layer) for layer in layers[:2]] == [RoomyLayer, RoomyLayer]
    assert layers[2] is sliding
