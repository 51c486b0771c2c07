"""The rows that an epoch sees under repeat_random."""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from trainer.assembly.rows import _subset
from trainer.config.errors import ConfigError
from trainer.data.batches import BatchOrder
from trainer.data.subset import Subset

SHAPES = [(20, 0.1), (20, 0.25), (23, 0.3), (7, 0.5), (100, 0.07), (3, 0.01)]


def order(count, share, steps_of=2, epochs=None, **options):
    subset = Subset(count, share, options.pop("seed", 0), **options)
    sizes = np.full(count, 5)
    return BatchOrder(sizes, sizes, 0, steps_of, 1, epochs=epochs, subset=subset)


@pytest.mark.parametrize(("count", "share"), SHAPES)
@pytest.mark.parametrize("draw", ["fresh", "independent", "fixed"])
@pytest.mark.parametrize("stratified", [False, True])
def test_an_epoch_sees_different_rows_and_as_many_as_its_share(count, share, draw, stratified):
    strata = np.arange(count) % 3 if stratified else None
    subset = Subset(count, share, 3, draw, strata)
    for epoch in range(12):
        rows = subset.of(epoch)
        assert len(set(rows.tolist())) == len(rows) == max(1, round(share * count))
        assert set(rows.tolist()) <= set(range(count))


@pytest.mark.parametrize(("count", "share"), SHAPES)
def test_as_many_epochs_as_fit_see_every_row(count, share):
    subset = Subset(count, share, 1)
    rounds = -(-count // subset.size)
    for start in (0, rounds, 5 * rounds):
        seen = Counter(itertools.chain(*(subset.of(start + i).tolist() for i in range(rounds))))
        assert set(seen) == set(range(count))
        assert sum(seen.values()) - count == -count % subset.size  # filled up at random
        assert max(seen.values()) <= 2
    first, second = (
        [subset.of(start + i).tolist() for i in range(rounds)] for start in (0, rounds)
    )
    assert first != second or count < 4


def test_draws_differ_as_they_say():
    fixed = Subset(200, 0.1, 0, "fixed")
    assert all(np.array_equal(fixed.of(0), fixed.of(epoch)) for epoch in range(1, 9))
    assert np.array_equal(fixed.of(0), Subset(200, 0.1, 0).of(0))
    independent = Subset(200, 0.1, 0, "independent")
    seen = {row for epoch in range(10) for row in independent.of(epoch).tolist()}
    assert 100 < len(seen) < 160  # 1 - 0.9^10 = 65 %
    assert not np.array_equal(Subset(200, 0.1, 1).of(0), Subset(200, 0.1, 0).of(0))


@pytest.mark.parametrize("draw", ["fresh", "independent", "fixed"])
def test_a_stratified_draw_has_the_classes_in_their_shares(draw):
    strata = np.repeat([0, 1, 2], [600, 300, 100])
    subset = Subset(1000, 0.1, 0, draw, strata)
    plain = Subset(1000, 0.1, 0, draw)
    expected = np.array([60, 30, 10])
    worst = [
        max(
            np.abs(np.bincount(strata[chosen.of(epoch)], minlength=3) - expected).max()
            for epoch in range(20)
        )
        for chosen in (subset, plain)
    ]
    assert worst[0] <= 2 < worst[1]


def test_steps_span_the_shorter_epochs():
    assert order(100, 0.1, 4, epochs=1).steps(None, None) == 3
    assert order(100, 0.1, 5, epochs=20).steps(None, None) == 40
    assert order(100, 0.1, 5, epochs=20).positions(40) == 200
    assert order(100, 0.1, 5, epochs=20).steps(None, 60) == 3  # of 25 tokens


@pytest.mark.parametrize("grouped", [False, True])
def test_a_step_has_the_rows_of_its_epoch_whenever_it_is_asked(grouped):
    """What makes a resume exact: the rows of step k do not depend on the steps before."""

    def built():
        subset, sizes = Subset(40, 0.2, 5), np.arange(1, 41)
        return BatchOrder(sizes, sizes, 5, 2, 2, group_by_length=grouped, subset=subset)

    whole = [built().micro_batches(step) for step in range(30)]
    one = built()
    for step in (29, 7, 0, 12):
        assert one.micro_batches(step) == whole[step]
    for epoch in range(10):
        rows = [
            pick.sequence
            for step in (2 * epoch, 2 * epoch + 1)
            for batch in whole[step]
            for pick in batch
        ]
        assert sorted(rows) == sorted(built().subset.of(epoch).tolist())


def test_without_a_share_nothing_changes():
    sizes = np.arange(1, 20)
    plain = BatchOrder(sizes, sizes, 2, 3, 1)
    rng = np.random.default_rng([2, 0])
    assert [plain.at(i) for i in range(19)] == rng.permutation(19).tolist()


SETTINGS = {
    "repeat_random": 0.2,
    "repeat_random_draw": "fixed",
    "repeat_random_stratified": True,
    "seed": 3,
}


def test_classes_are_those_of_the_rows():
    rows = [SimpleNamespace(label=row % 2) for row in range(30)]
    task = SimpleNamespace(kind="label", problem="single_label_classification")
    data: Any = SimpleNamespace(task=task, train=SimpleNamespace(rows=rows))
    subset = _subset(SETTINGS, data, 30)
    assert subset is not None
    assert (subset.share, subset.seed, subset.draw) == (0.2, 3, "fixed")
    assert sorted(int(row) % 2 for row in subset.of(0)) == [0, 0, 0, 1, 1, 1]
    assert _subset(SETTINGS | {"repeat_random": None}, data, 30) is None


@pytest.mark.parametrize(
    "task",
    [
        SimpleNamespace(kind="conversation"),
        SimpleNamespace(kind="label", problem="regression"),
        SimpleNamespace(kind="label", problem="multi_label_classification"),
    ],
)
def test_rows_without_classes_have_no_strata(task):
    data: Any = SimpleNamespace(task=task, train=None)
    with pytest.raises(ConfigError, match="rows have none: set repeat_random_stratified=false"):
        _subset(SETTINGS, data, 30)
    plain = _subset(SETTINGS | {"repeat_random_stratified": False}, data, 30)
    assert plain is not None
    assert plain.strata is None
