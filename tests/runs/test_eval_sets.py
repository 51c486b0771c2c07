"""A run with further sets of evaluation: each has its own numbers wherever numbers stand."""

from __future__ import annotations

import json

import pytest

from tests.conftest import write_rows
from tests.toys.commands import exit_code
from trainer import evaluate
from trainer.callbacks.dashboards import numbers
from trainer.storage import journal


def chat(question, answer):
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


@pytest.fixture
def words(chats, tmp_path):
    """The same rows as a further set, and others that the run does not learn."""
    hard = write_rows(tmp_path / "hard.jsonl", [chat(c * 5, "zqx" * 3) for c in "abcdef"])
    sets = f"{{same: '{chats}', hard: {{path: '{hard}', limit: 4}}}}"
    return [f"task.path={chats}", f"task.eval_path={chats}", f"task.eval_sets={sets}"]


def test_each_set_has_its_own_numbers(train, words, tmp_path, capsys):
    run = train(
        *words,
        "max_steps=4",
        "callbacks.evaluation.generate=2",
        "callbacks.evaluation.monitor=hard/loss",
        "name=sets",
    )
    rows = [row for row in journal.read(run / "metrics.jsonl") if row["kind"] == "evaluation"]
    for row in rows:
        assert row["same/loss"] == pytest.approx(row["loss"], rel=1e-6)
        assert row["same/accuracy"] == pytest.approx(row["accuracy"])
        assert abs(row["hard/loss"] - row["loss"]) > 1e-3
    assert {"exact_match", "same/exact_match", "hard/exact_match"} <= rows[-1].keys()
    assert "eval/hard/loss" in numbers("evaluation", rows[-1])
    report = (run / "report.html").read_text()
    assert "hard/loss" in report
    assert "same/accuracy" in report

    capsys.readouterr()
    file = tmp_path / "numbers.json"
    assert exit_code(evaluate.main, [f"run={run}", f"json={file}", "generate=2"]) == 0
    again = json.loads(file.read_text())["adapted"]
    for name in ("loss", "hard/loss", "same/loss", "hard/perplexity", "hard/exact_match"):
        assert again[name] == pytest.approx(rows[-1][name], rel=1e-5)
    assert "hard/loss" in capsys.readouterr().out

    # a resumed run has the same rows in every set
    assert (
        train(
            *words,
            "max_steps=4",
            "callbacks.evaluation.generate=2",
            "name=sets",
            "callbacks.evaluation.monitor=hard/loss",
            "resume=auto",
        )
        == run
    )
