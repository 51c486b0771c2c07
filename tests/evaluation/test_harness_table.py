"""Tables of what lm-eval measured, from rows of a journal."""

from __future__ import annotations

import math
import statistics

import pytest

from trainer.callbacks.dashboards import numbers
from trainer.evaluation import harness, harness_table

BASE = {
    "kind": "harness", "step": 0, "model": "base", "settings": "0-shot", "rows": {"a": 200},
    "a/acc": 0.4, "a/acc/stderr": 0.02, "b/f1": 0.3, "seconds": 1.0,
}  # fmt: skip
ADAPTED = BASE | {"step": 40, "model": "adapted", "a/acc": 0.5, "a/acc/stderr": 0.01}


def test_both_models_side_by_side_with_intervals():
    table = harness_table.table([BASE, ADAPTED | {"step": 20, "a/acc": 0.1}, ADAPTED])
    assert table.rows == [
        ["a/acc", "0.4000 ± 0.0392", "0.5000 ± 0.0196", "40", "0-shot; 200 rows"],
        ["b/f1", "0.3000", "0.3000", "40", "0-shot"],
    ]


def test_scores_of_other_settings_are_not_compared():
    table = harness_table.table([BASE, ADAPTED | {"settings": "5-shot"}])
    assert table.rows[0][:3] == ["a/acc", "", "0.5000 ± 0.0196"]


@pytest.mark.parametrize(
    "row",
    [
        {"kind": "harness", "step": 1, "model": "adapted", "a/acc": "much"},
        {"kind": "harness", "step": 1, "model": 3, "a/acc": 0.5, "rows": "all"},
        {"kind": "harness", "step": 1},
    ],
)
def test_a_strangers_row_breaks_no_table(row):
    table = harness_table.table([row])
    assert table is None or table.rows[0][:3] == ["a/acc", "", ""]


def sample(row, acc, way="none", **more):
    return {"doc_id": row, "filter": way, "metrics": ["acc"], "acc": acc} | more


def test_a_difference_is_over_the_same_rows():
    base = {"a": [sample(i, value) for i, value in enumerate([0.0, 1.0, 0.0, 1.0])]}
    adapted = {"a": [sample(i, value) for i, value in enumerate([1.0, 1.0, 0.0, 1.0, 1.0])]}
    mean, error = harness_table.paired(base, adapted)["a/acc"]
    differences = [1.0, 0.0, 0.0, 0.0]  # the fifth row was not asked before
    assert mean == pytest.approx(statistics.mean(differences))
    assert error == pytest.approx(statistics.stdev(differences) / math.sqrt(4))
    assert harness_table.paired({}, adapted) == {}
    assert [*harness_table.paired({"a": [sample(i, 0, "strict") for i in range(2)]},
                                  {"a": [sample(i, i, "strict") for i in range(2)]})] == [
        "a/acc,strict"
    ]  # fmt: skip


def test_what_lm_eval_returns_is_read_with_its_filters():
    results = {
        "results": {
            "gsm8k": {
                "alias": "gsm8k", "exact_match,strict-match": 0.25, "acc,none": float("nan"),
                "exact_match_stderr,strict-match": 0.05, "bleu,none": 3, "bleu_stderr,none": "N/A",
            }
        },
        "n-samples": {"gsm8k": {"original": 1319, "effective": 100}},
    }  # fmt: skip
    scores = harness.scores(results)
    assert scores.numbers == {
        "gsm8k/exact_match,strict-match": 0.25,
        "gsm8k/exact_match,strict-match/stderr": 0.05,
        "gsm8k/bleu": 3.0,
    }
    assert scores.rows == {"gsm8k": 100}


def test_dashboards_get_a_curve_for_each_model():
    assert numbers("harness", BASE)["harness_base/a/acc"] == 0.4
    assert numbers("harness", ADAPTED)["harness/a/acc/stderr"] == 0.01


def test_without_lm_eval_the_message_has_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    settings = harness.Settings(("arc_easy",))
    with pytest.raises(harness.ConfigError) as error:
        harness.find(settings)
    assert str(error.value) == (
        f"harness=arc_easy needs lm-eval, which is not installed here. Fix: {harness.INSTALL}"
    )


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (harness.Settings(("a",)), "as each task says, all rows, plain prompts"),
        (harness.Settings(("a",), None, 0.1, 5, True), "5-shot, 10% of the rows, chat template"),
        (harness.Settings(("a",), None, 20.0, 0), "0-shot, the first 20 rows, plain prompts"),
    ],
)
def test_settings_in_words(settings, text):
    assert settings.text == text
