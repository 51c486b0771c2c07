"""Objects from config nodes: their own errors, and a schedule whose cooldown is given in tokens."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from tasks.reading import DataError
from tests.toys import tasks as toys
from trainer.assembly.build import instantiate, new_modules, schedule
from trainer.config.errors import ConfigError
from trainer.data.batches import BatchOrder

COOLDOWN = {
    "_target_": "trainer.schedules.cooldown.cooldown",
    "_partial_": True,
    "warmup": 2,
    "cooldown": 0.2,
    "cooldown_tokens": None,
    "shape": "linear",
    "final": 0.0,
}
SFT = toys.SFT | {
    "_target_": "tasks.sft.SFT",
    "path": "nowhere.jsonl",
    "eval_fraction": 0.1,
    "shuffle_block": 1,
    "on_bad": "error",
}


def test_a_parts_own_error_is_raised_and_not_hydras():
    with pytest.raises(DataError, match="there is no such file"):
        instantiate(SFT)


def test_what_is_given_joins_the_node_and_lists_stay_lists():
    node = {"_target_": "types.SimpleNamespace", "names": ["a"], "deep": {"b": [1]}}
    actual = instantiate(node, more=2)
    assert (actual.names, actual.deep, actual.more) == (["a"], {"b": [1]}, 2)
    assert type(actual.names) is list
    assert type(actual.deep) is dict


def order(lengths, batch_size):
    return BatchOrder(np.array(lengths), np.array(lengths), 0, batch_size, 1, 1, False, 1)


@pytest.mark.parametrize("tokens", [1, 40, 90, 10_000])
def test_a_cooldown_in_tokens_is_the_one_of_as_many_steps(tokens):
    lengths = [10, 20, 30, 5, 25, 15, 8, 12]
    rows = order(lengths, 2)
    steps = 4
    # the steps that have the tokens, counted from the last one back
    sizes = [sum(lengths[i] for i, _ in rows.window(step)) for step in range(steps)]
    sums = [*itertools.accumulate(reversed(sizes))]
    expected = next((n for n, total in enumerate(sums, 1) if total >= tokens), steps)
    in_tokens = schedule({"schedule": COOLDOWN | {"cooldown_tokens": tokens}}, rows)
    in_steps = schedule({"schedule": COOLDOWN | {"cooldown": expected}}, rows)
    for step in range(steps + 1):
        assert in_tokens(step, steps) == in_steps(step, steps=steps)


def test_a_stream_has_no_cooldown_in_tokens():
    with pytest.raises(ConfigError, match=r"schedule.cooldown_tokens=9: a stream's tokens"):
        schedule({"schedule": COOLDOWN | {"cooldown_tokens": 9}}, None)


def test_only_a_classifier_has_new_modules():
    model = SimpleNamespace(fresh_modules=("score",))
    assert new_modules(model, None) == ()
    assert new_modules(model, ["a", "b"]) == ("score",)
