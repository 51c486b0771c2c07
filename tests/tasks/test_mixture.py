"""Weighted parts: how often rows come, what is held out, and what is refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tasks.mixture import Mixture
from tasks.reading import DataError
from tests.conftest import write_rows


def mixture(parts: Any, **changes: Any) -> Mixture:
    settings = {
        "eval_fraction": 0.0,
        "eval_limit": None,
        "format": "auto",
        "columns": {},
        "system": None,
        "chat_template": None,
        "train_on": "all",
        "metric": "exact_match",
        "on_bad": "raise",
        "weight_column": None,
        "on_lost": "error",
        "chat_template_kwargs": {},
        "eval_sets": {},
    }
    return Mixture(parts, **settings | changes)


@pytest.fixture
def files(tmp_path):
    built = {}
    for name, count in {"a": 40, "b": 400}.items():
        rows = [{"prompt": f"{name}{i}?", "completion": f"{i}!"} for i in range(count)]
        built[name] = str(write_rows(tmp_path / f"{name}.jsonl", rows))
    return built


def counted(task: Mixture, split: str = "train") -> Counter[str]:
    return Counter(example.messages[0]["content"] for example in task.examples(split))


def test_a_weight_says_how_often_a_row_comes(files):
    actual = counted(
        mixture({"a": {"path": files["a"], "weight": 2}, "b": {"path": files["b"], "weight": 0.25}})
    )
    assert {prompt: times for prompt, times in actual.items() if prompt[0] == "a"} == {
        f"a{i}?": 2 for i in range(40)
    }
    some = {prompt: times for prompt, times in actual.items() if prompt[0] == "b"}
    assert set(some.values()) == {1}
    assert 70 < len(some) < 130  # 100 of 400 expected; four standard deviations are 35


def test_the_draw_is_fixed_and_grows_with_the_weight(files):
    def rows(weight):
        return counted(mixture({"b": {"path": files["b"], "weight": weight}}))

    assert rows(0.25) == rows(0.25)
    assert rows(0.25).keys() < rows(0.5).keys()
    assert (rows(1.25) - rows(0.25)) == rows(1)


def test_held_out_rows_come_once_and_are_not_trained(files):
    task = mixture(
        {"a": {"path": files["a"], "weight": 3}, "b": {"path": files["b"], "weight": 0.1}},
        eval_fraction=0.1,
    )
    held_out = counted(task, "eval")
    assert Counter(prompt[0] for prompt in held_out.elements()) == {"a": 4, "b": 40}
    assert set(held_out.values()) == {1}
    assert not held_out.keys() & counted(task).keys()


def test_a_part_may_have_its_own_rows_of_evaluation_and_form(files, tmp_path):
    rows = [{"question": "q?", "answer": "r"}]
    other = str(write_rows(tmp_path / "other.jsonl", rows))
    task = mixture(
        {
            "a": {"path": files["a"], "eval_path": files["b"]},
            "other": {"path": other, "columns": {"prompt": "question", "completion": "answer"}},
        }
    )
    assert len(counted(task, "eval")) == 400
    assert counted(task)["q?"] == 1
    assert task.grade(next(task.examples("train")), "0!") == {"exact_match": 1.0}


def test_the_digest_changes_with_weights_in_training_only(files):
    one, two = (
        mixture({"a": {"path": files["a"], "weight": w}}, eval_fraction=0.1) for w in (1, 2)
    )
    assert one.fingerprint("train") != two.fingerprint("train")
    assert one.fingerprint("eval") == two.fingerprint("eval")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "task.parts is empty"),
        ({"a": "rows.jsonl"}, "task.parts.a is 'rows.jsonl', expected a mapping with path"),
        ({"a": {"path": "x.jsonl", "wieght": 2}}, "a mapping with path"),
        (
            {"a": {"path": "x.jsonl", "weight": 0}},
            "task.parts.a.weight is 0, expected a number above 0",
        ),
        ({"a": {"path": "x.jsonl", "weight": "1"}}, "task.parts.a.weight is '1'"),
        ({"a": {"path": "not-there.jsonl"}}, "task.parts.a: "),
    ],
)
def test_what_cannot_be_mixed_is_refused(parts, message):
    with pytest.raises(DataError, match=message):
        mixture(parts)
