"""Indices and bounds that a batch brings along are those that would be computed from it."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import masking_utils

from tests.toys.heads import APART, PACKED, batch_of
from trainer.data.batches import Collate, Pick, Sequences
from trainer.data.render import Tokens
from trainer.models import on_host
from trainer.speed import flash, known_rows

ROW = Tokens([5, 9, 3, 7, 11, 13, 2, 8], [True] * 8)  # a packed sequence without padding


@pytest.mark.parametrize("packs", [APART, PACKED])
def test_supervised_positions_are_those_before_a_trained_token(packs):
    batch = batch_of(*packs)
    labels, width = batch["labels"].tolist(), batch["labels"].shape[1]
    expected = [
        row * width + t
        for row, own in enumerate(labels)
        for t in range(width - 1)
        if own[t + 1] != -100
    ]
    assert batch["supervised"].tolist() == expected
    del batch["supervised"]
    assert on_host.supervised(batch).tolist() == expected
    following = [label for own in labels for label in own[1:] if label != -100]
    assert on_host.picked(batch["labels"], torch.tensor(expected) + 1).tolist() == following


def test_nothing_trained_gives_no_position():
    at = on_host.supervised_positions(torch.full((2, 8), -100))
    assert (at.shape, at.dtype) == ((0,), torch.int64)
    assert on_host.picked(torch.ones(2, 8, 3), at).shape == (0, 3)
    assert int(on_host.count(at)) == 0
    assert not on_host.placed(torch.ones(0), at, torch.Size([2, 8])).any()


def test_values_go_back_to_their_places():
    mask = torch.tensor([[True, False, True], [False, True, False]])
    values = torch.tensor([1.0, 2.0, 3.0])
    there = on_host.placed(values, on_host.flat(mask), mask.shape)
    assert there.tolist() == [[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]]


@pytest.mark.parametrize("packs", [APART, PACKED])
def test_a_batch_without_a_host_gets_the_same_one(packs):
    batch = batch_of(*packs)
    own = batch.pop("host")
    made = on_host.host_of(batch)
    assert own.lengths == batch["lengths"].tolist()
    assert torch.equal(made.labels, own.labels)
    assert torch.equal(made.positions, own.positions)


@pytest.mark.parametrize("packs", [APART, PACKED, None])
def test_masks_and_bounds_are_those_that_would_be_computed(packs, monkeypatch):
    batch = batch_of(*packs) if packs else Collate(0, True, False)([(Pick(0, True, 1), [ROW])])
    own, positions = masking_utils.find_packed_sequence_indices, batch.get("position_ids")
    places = torch.arange(batch["labels"].shape[1]) if positions is None else positions
    places = places.expand_as(batch["labels"])
    expected = own(places)
    with known_rows.of(batch):
        indices = masking_utils.find_packed_sequence_indices(places)
    assert masking_utils.find_packed_sequence_indices is own
    assert (indices is None) == (expected is None)
    assert indices is None or torch.equal(indices, expected)
    if positions is not None:
        computed = flash.rows_of(positions)
        monkeypatch.setattr(flash, "rows_of", None)
        noted = flash.rows_of_pass(positions)
        assert noted.keys() == computed.keys()
        for name, value in noted.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(computed[name])), name


def test_a_batch_whose_positions_were_taken_away_is_one_row():
    """Then a model counts positions through the whole sequence."""
    batch = batch_of(*PACKED)
    del batch["position_ids"]
    with known_rows.of(batch):
        assert masking_utils.find_packed_sequence_indices(torch.arange(8).view(1, 8)) is None


def test_it_comes_from_a_loading_process():
    rows = [Tokens([1, 2, 3], [False, True, True]), Tokens([4, 5], [True, True])]
    picks = [[Pick(0, True, 3), Pick(1, True, 3)]]
    sequences = Sequences(rows)
    (batch,) = DataLoader(
        sequences, batch_sampler=picks, collate_fn=Collate(0, True, False), num_workers=1
    )
    assert batch["host"].lengths == [3, 2]
    assert torch.equal(batch["host"].labels, batch["labels"])
    assert batch["supervised"].tolist() == [0, 1, 8]
