"""What ways of decoding come to is what a naive count counts."""

from __future__ import annotations

import json

import numpy as np
import pytest

from trainer.decoding.speculative import Result
from trainer.evaluation.decode_ways import Answer
from trainer.evaluation.speedup import figures, interval, summary_by_category
from trainer.evaluation.speedup_report import categories_report


def answer(question, category, drafts, seconds=(1.0, 2.0, 0.5), tokens=None):
    """Seconds are of transformers, plain and the drafter."""
    count = 1 + sum(taken + 1 for _, taken in drafts) if tokens is None else tokens
    alone, text = [(0, 0)] * (count - 1), lambda: list(range(count))
    results = {
        "transformers": Result(text(), alone, seconds[0], 0.0),
        "plain": Result(text(), alone, seconds[1], 0.1, 0.0, 0.2 * len(alone)),
        "drafter": Result(
            text(),
            drafts,
            seconds[2],
            0.1,
            0.01 * len(drafts),
            0.3 * len(drafts),
            sum(n for n, _ in drafts),
        ),
    }
    return Answer(question, 0, category, results)


ANSWERS = [
    answer(0, "a", [(3, 3), (3, 1), (0, 0)]),
    answer(0, "a", [(3, 0), (2, 2)], (2.0, 2.0, 1.0)),
    answer(1, "b", [(3, 2), (3, 3)], (1.0, 3.0, 1.5)),
]


def test_figures_are_those_of_a_plain_count():
    actual = figures(ANSWERS)
    steps = [step for answer in ANSWERS for step in answer.results["drafter"].drafts]
    tokens = sum(len(answer.results["plain"].tokens) for answer in ANSWERS)
    assert (
        actual["tau"]["value"] == pytest.approx((tokens - 3) / len(steps)) == pytest.approx(18 / 7)
    )
    assert (actual["questions"], actual["answers"]) == (2, 3)
    assert actual["ways"]["plain"]["target_passes"] == tokens
    assert actual["ways"]["drafter"]["target_passes"] == 3 + 7
    assert actual["ways"]["drafter"]["tokens_per_second"] == tokens / 3.0
    assert actual["speed_up"]["transformers"]["value"] == pytest.approx(4.0 / 3.0)
    assert actual["speed_up"]["plain"]["value"] == pytest.approx(7.0 / 3.0)
    for k, place in enumerate(actual["positions"]):
        proposed = [taken for proposed, taken in steps if proposed > k]
        reached = [taken for taken in proposed if taken >= k]
        assert place["conditional"] == sum(taken > k for taken in reached) / len(reached)
        # one pass had no draft
        assert place["survival"] == sum(taken > k for _, taken in steps) / 6
    assert [place["proposed"] for place in actual["positions"]] == [6, 6, 5]
    assert actual["pass"] == pytest.approx(
        {"nodes": 17 / 7, "draft_ms": 10.0, "verify_ms": 300.0, "plain_ms": 200.0}
    )


def test_an_interval_is_that_of_resampled_questions():
    draw = np.random.default_rng(5)
    above, below = draw.uniform(1, 3, 40), draw.uniform(1, 2, 40)
    answers = [Answer(i // 2, 0, "", {"n": i}) for i in range(40)]
    actual = interval(answers, lambda a: above[a.results["n"]], lambda a: below[a.results["n"]])
    assert actual["value"] == pytest.approx(above.sum() / below.sum())
    ratios = []
    for _ in range(4000):
        rows = [
            row
            for question in draw.integers(20, size=20)
            for row in (2 * question, 2 * question + 1)
        ]
        ratios.append(above[rows].sum() / below[rows].sum())
    low, high = np.percentile(ratios, [2.5, 97.5])
    assert actual["low"] == pytest.approx(low, abs=0.1 * (high - low))
    assert actual["high"] == pytest.approx(high, abs=0.1 * (high - low))
    assert interval(answers[:2], lambda a: 1, lambda a: 2) == {
        "value": 0.5,
        "low": None,
        "high": None,
    }
    assert interval(answers, lambda a: 1, lambda a: 0)["value"] is None


def test_sampled_texts_of_other_lengths_have_a_ratio_of_rates():
    answers = [answer(0, "a", [(3, 3)]), answer(1, "a", [(3, 1)])]
    answers[1].results["transformers"].tokens.extend([1, 2, 3])
    actual = figures(answers)["speed_up"]["transformers"]["value"]
    assert actual == pytest.approx((8 / 1.0) / (11 / 2.0))


def test_answers_of_the_drafter_alone_count_for_tau_and_not_for_speed():
    alone = answer(2, "c", [(3, 0), (3, 1)], (1.0, 1.0, 100.0))
    del alone.results["transformers"], alone.results["plain"]
    before, actual = figures(ANSWERS), figures([*ANSWERS, alone])
    assert (actual["answers"], actual["compared"]) == (4, 3)
    for key in ("ways", "speed_up"):
        assert actual[key] == before[key]
    assert actual["tau"]["value"] == pytest.approx((18 + 3) / (7 + 2))
    assert actual["pass"]["plain_ms"] == before["pass"]["plain_ms"]
    summary = summary_by_category([*ANSWERS, alone], 0, 0.0)
    assert summary["categories"]["c"]["speed_up"]["plain"]["value"] is None
    assert summary["different_texts"] == {"plain": 0, "drafter": 0}
    assert any("3 of 4 answers" in str(part) for part in categories_report(summary))


def test_the_summary_tells_categories_apart_and_counts_different_texts():
    answers = [*ANSWERS[:2], answer(1, "b", [(3, 2), (3, 3)], (1.0, 3.0, 1.5))]
    answers[2].results["drafter"].tokens[-1] = 99
    actual = summary_by_category(answers, 4, 0.0)
    assert {name: row["answers"] for name, row in actual["categories"].items()} == {"a": 2, "b": 1}
    assert actual["categories"]["b"]["tau"]["value"] == 3.5
    assert actual["different_texts"] == {"plain": 0, "drafter": 1}
    assert actual["left_out"] == 4
    assert [row["drafter"]["steps"] for row in actual["each"]] == [3, 2, 2]
    assert json.loads(json.dumps(actual)) == actual
