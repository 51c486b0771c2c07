"""When one more drafted token pays, and the temperatures of predicted acceptance."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from tests.decoding.test_trees import Table
from trainer.decoding import profit
from trainer.decoding.drawing import Drawing
from trainer.decoding.policies import ProfitablePolicy
from trainer.decoding.profit import Profit
from trainer.decoding.trees import chain, named
from trainer.drafters import DrafterError

V = 6


def lengths_by_hand(seconds, acceptance, chances):
    """The length at which the expected tokens per second first fall, of a drafter whose tokens have
    these predicted acceptances."""
    for k in range(1, len(seconds) - 1):
        products = np.cumprod(chances[:k])
        tokens = 1 + products.sum()
        if (tokens + products[-1] * acceptance[k]) / seconds[k + 1] <= tokens / seconds[k]:
            return k
    return len(seconds) - 1


@pytest.mark.parametrize("seed", range(6))
def test_a_chain_ends_where_another_token_does_not_pay(seed):
    draw = np.random.default_rng(seed)
    seconds = np.cumsum(draw.uniform(0.1, 0.6, 6)) + 1
    rates, chances = draw.uniform(0.2, 1.0, 5), draw.uniform(0.2, 1.0, 5)
    policy = ProfitablePolicy(Profit([*seconds], [*rates], []))
    expected = lengths_by_hand(seconds, rates, chances)
    for _ in range(2):  # the second draft starts afresh
        growth = Table(6, confidence=lambda path: float(chances[len(path) - 1]))
        assert len(chain(6, policy)(growth, Drawing(V, 9)).tokens) == expected


def test_temperatures_scale_what_the_policy_reads():
    costs = Profit([1.0, 1.2, 1.4], [0.9, 0.9], [2.0])
    assert costs.scaled(1, 0.9) == pytest.approx(1 / (1 + math.exp(-math.log(9) / 2)))
    assert costs.scaled(2, 0.9) == pytest.approx(0.9)
    assert math.isfinite(costs.scaled(1, 0.0))
    assert costs.scaled(1, 1.0) <= 1


def synthetic(theta, count=4000, seed=0):
    """Drafts whose predictions are too sure by these temperatures."""
    draw = np.random.default_rng(seed)
    drafts = []
    for _ in range(count):
        right, draft = True, []
        for one in theta:
            true = draw.normal(0.5, 1.0)
            right = right and draw.random() < 1 / (1 + math.exp(-true))
            draft.append((true * one, bool(right)))
        drafts.append(draft)
    return drafts


def test_temperatures_undo_predictions_that_are_too_sure():
    drafts = synthetic([3.0, 1.0, 2.0])
    actual = profit.temperatures(drafts)
    assert actual == pytest.approx([3.0, 1.0, 2.0], rel=0.3)
    logits, taken = (np.array([draft[0][i] for draft in drafts]) for i in (0, 1))
    before, after = (
        profit.calibration_error(1 / (1 + np.exp(-logits / theta)), taken)
        for theta in (1.0, actual[0])
    )
    assert after < 0.03 < before
    assert profit.temperatures([]) == []


def test_the_calibration_error_is_that_of_a_loop_over_bins():
    draw = np.random.default_rng(1)
    predicted, taken = draw.random(100), draw.random(100) < 0.3
    pairs = sorted(zip(predicted, taken, strict=True))
    expected, start = 0.0, 0
    for size in [7] * 10 + [6] * 5:
        part = pairs[start : start + size]
        start += size
        expected += abs(sum(p for p, _ in part) - sum(t for _, t in part)) / 100
    assert profit.calibration_error(predicted, taken) == pytest.approx(expected)


def test_files_of_other_things_are_refused(tmp_path):
    file = tmp_path / "costs.json"
    good = {"seconds": [1.0, 1.1], "acceptance": [0.5], "temperatures": [1.5]}
    file.write_text(json.dumps({"profit": good}))
    policy = named("chain", 4, policy=f"profitable:{file}").policy
    assert isinstance(policy, ProfitablePolicy)
    assert policy.profit == Profit(**good)
    for bad in (
        {},
        {"profit": good | {"seconds": [1.0]}},
        {"profit": good | {"temperatures": [0.0]}},
        {"profit": good | {"acceptance": [float("nan")]}},
        {"profit": good | {"acceptance": "x"}},
    ):
        file.write_text(json.dumps(bad))
        with pytest.raises(DrafterError, match="expected the file of graft speculate"):
            named("chain", policy=f"profitable:{file}")
    with pytest.raises(DrafterError, match="expected the file of graft speculate"):
        named("chain", policy=f"profitable:{tmp_path / 'nowhere.json'}")
    with pytest.raises(DrafterError, match="is for chains"):
        named("eagle2", policy=f"profitable:{file}")


def test_a_level_is_decided_before_its_tokens_are_drawn():
    """Nothing that the policy reads depends on the tokens of the level that it decides on."""
    seen = []

    class Watching(ProfitablePolicy):
        def __call__(self, level):
            seen.append((level.number, level.confidence.tolist()))
            return super().__call__(level)

    policy = Watching(Profit([1.0] * 6, [1.0] * 5, []))
    growth = Table(5, confidence=lambda path: 0.5 + 0.05 * len(path))
    drafted = chain(5, policy)(growth, Drawing(V, 9)).tokens
    assert len(drafted) == 5
    assert seen == [(n, pytest.approx([0.5 + 0.05 * (n - 1)])) for n in range(2, 6)]
    assert torch.is_tensor(drafted)
