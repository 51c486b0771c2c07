"""Patterns of zeros against loops."""

from __future__ import annotations

import pytest
import torch

from trainer.shrinking.patterns import Pattern


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("name", "kept", "group"), [("2:4", 2, 4), ("4:8", 4, 8)])
def test_of_each_group_the_largest_scores_stay(name, kept, group):
    scores = drawn(5, 16)
    mask = Pattern.of(name).keep(scores)
    for row in range(5):
        for start in range(0, 16, group):
            part = scores[row, start : start + group].tolist()
            best = sorted(range(group), key=lambda j, part=part: -part[j])[:kept]
            assert mask[row, start : start + group].nonzero().flatten().tolist() == sorted(best)


def test_unstructured_keeps_a_share_of_each_row():
    scores = drawn(5, 16)
    mask = Pattern.of("unstructured", 0.3).keep(scores)
    for row in range(5):
        best = sorted(range(16), key=lambda j, row=row: -scores[row, j])[:5]  # round(4.8)
        assert mask[row].nonzero().flatten().tolist() == sorted(best)
    assert Pattern.of("unstructured").density == 0.5


def test_equal_scores_still_give_the_pattern():
    mask = Pattern.of("2:4").keep(torch.zeros(3, 8))
    assert (mask.view(3, 2, 4).sum(-1) == 2).all()


def test_a_weight_follows_its_pattern_and_no_denser_one():
    pattern, weight = Pattern.of("2:4"), drawn(4, 8)
    assert not pattern.follows(weight)
    pruned = weight * pattern.keep(weight.abs())
    assert pattern.follows(pruned)
    assert Pattern.of("unstructured", 0.5).follows(pruned)
    pruned[0, :4] = 1.0
    assert not pattern.follows(pruned)
    assert not pattern.follows(drawn(4, 6))


@pytest.mark.parametrize(
    ("pattern", "inputs", "fault"),
    [
        (Pattern.of("2:4"), 6, "6 inputs are no multiple of 4"),
        (Pattern.of("4:8"), 12, "12 inputs are no multiple of 8"),
        (Pattern.of("4:8"), 16, None),
        (Pattern.of("unstructured", 0.01), 16, "density=0.01 of 16 inputs keeps 0"),
        (Pattern.of("unstructured", 0.99), 16, "density=0.99 of 16 inputs keeps 16"),
    ],
)
def test_sizes_that_a_pattern_does_not_divide(pattern, inputs, fault):
    assert pattern.fault(inputs) == fault
