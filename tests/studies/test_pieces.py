"""Which runs of a study are missing: the search for rates, seeds, and what was done before."""

from __future__ import annotations

import fcntl
import json
import math
from dataclasses import asdict, replace

import pytest

from trainer.config.errors import ConfigError
from trainer.studies import pieces, running
from trainer.studies.plan import Data, Method, Study


def make(tmp_path, rates=(1e-4, 3e-4, 1e-3), **changes):
    study = Study(
        name="mine",
        runs=str(tmp_path),
        overrides=[],
        data={"sums": Data([], [], 0, 8, 8)},
        methods={"lora": Method(["adapter=lora"], 0.5, True, list(rates))},
        parameters=None,
        widen=4,
        search=[],
        search_seed=0,
        seeds=[0, 1],
        choose="loss",
        mode="min",
        baseline="lora",
        keep=True,
    )
    return replace(study, **changes)


def play(study, loss, results=None):
    """Run a study whose runs have the loss `loss(piece)`, one at a time; None is a failure. Return
    the pieces in their order."""
    results = {} if results is None else results
    order = []
    while (piece := next(pieces.missing(study, results), None)) is not None:
        order.append(piece)
        value = loss(piece)
        results[piece.key] = {"piece": asdict(piece), "words": piece.words(study)} | (
            {"failed": 1} if value is None else {"validation": {"loss": value}}
        )
        assert len(order) < 50
    return order, results


def bowl(best):
    return lambda piece: (math.log(piece.rate) - math.log(best)) ** 2 + 0.01 * piece.seed


def test_a_search_widens_while_its_best_is_at_an_edge(tmp_path):
    study = make(tmp_path)
    order, results = play(study, bowl(9e-3))
    rates = [piece.rate for piece in order if piece.seed == 0]
    assert rates == pytest.approx([1e-4, 3e-4, 1e-3, 3.3e-3, 1.1e-2, 3.7e-2])
    assert [piece.rate for piece in order if piece.seed == 1] == [1.1e-2]
    assert pieces.chosen_rate(study, "sums", "lora", results) == 1.1e-2
    assert not pieces.at_edge(study, "sums", "lora", results)
    # the other way, to the limit, which leaves the best at an edge
    order, results = play(make(tmp_path, widen=1), bowl(1e-6))
    assert [piece.rate for piece in order] == pytest.approx([1e-4, 3e-4, 1e-3, 3.3e-5, 3.3e-5])
    assert pieces.at_edge(make(tmp_path, widen=1), "sums", "lora", results)


def test_a_higher_metric_may_be_better(tmp_path):
    study = make(tmp_path, mode="max")
    _, results = play(study, lambda piece: -bowl(3e-4)(piece))
    assert pieces.chosen_rate(study, "sums", "lora", results) == 3e-4


def test_a_study_is_extended_and_repeats_nothing(tmp_path):
    _, results = play(make(tmp_path), bowl(3e-4))
    before = set(results)
    order, results = play(make(tmp_path, seeds=[0, 1, 2]), bowl(3e-4), results)
    assert [piece.key for piece in order] == ["sums-lora-0.0003-2"]
    more = make(tmp_path, rates=(1e-4, 2e-4, 3e-4, 1e-3), seeds=[0, 1, 2])
    order, results = play(more, lambda piece: -1.0, results)
    assert [piece.key for piece in order] == [f"sums-lora-0.0002-{seed}" for seed in (0, 1, 2)]
    assert before < set(results)


def test_shorter_runs_of_a_search_are_no_runs_of_the_study(tmp_path):
    study = make(tmp_path, search=["max_steps=3"])
    order, _ = play(study, bowl(3e-4))
    assert [piece.searches for piece in order] == [True, True, True, False, False]
    assert "max_steps=3" in order[0].words(study)
    assert "max_steps=3" not in order[-1].words(study)
    assert {piece.key for piece in order[3:]} == {"sums-lora-0.0003-0", "sums-lora-0.0003-1"}


def test_one_rate_needs_no_search(tmp_path):
    order, _ = play(make(tmp_path, rates=[5e-4], search=["max_steps=3"]), bowl(1))
    assert [(piece.rate, piece.seed) for piece in order] == [(5e-4, 0), (5e-4, 1)]


def test_a_failure_ends_neither_a_search_nor_a_study(tmp_path):
    study = make(tmp_path)
    # the highest rate diverges: the search does not widen beyond it
    order, results = play(study, lambda p: None if p.rate >= 1e-3 else bowl(4e-4)(p))
    assert pieces.chosen_rate(study, "sums", "lora", results) == 3e-4
    assert [piece.rate for piece in order] == [1e-4, 3e-4, 1e-3, 3e-4]
    order, results = play(study, lambda piece: None)
    assert len(order) == 3
    assert pieces.chosen_rate(study, "sums", "lora", results) is None


def test_results_with_other_settings_are_refused(tmp_path):
    study = make(tmp_path)
    _, results = play(study, bowl(3e-4))
    folder = study.folder / "pieces"
    folder.mkdir(parents=True)
    for key, result in results.items():
        (folder / f"{key}.json").write_text(json.dumps(result))
    assert pieces.load(study) == results
    with pytest.raises(ConfigError, match=r"(?s)with other settings.*now:  max_steps=9"):
        pieces.load(replace(study, overrides=["max_steps=9"]))
    (folder / "x.json").write_text("{")
    with pytest.raises(ConfigError, match=r"x\.json cannot be read as a result: remove it"):
        pieces.load(study)


def saved(study, results):
    """Write results as a study does."""
    folder = study.folder / "pieces"
    folder.mkdir(parents=True)
    for key, result in results.items():
        (folder / f"{key}.json").write_text(json.dumps(result))


def test_equally_good_rates_give_the_same_choice_after_a_restart(tmp_path):
    # in files the order of keys is another one: 0.0001, 0.001, 1e-05
    study = make(tmp_path, rates=(1e-5, 1e-4, 1e-3))
    order, results = play(study, lambda piece: 0.0)
    assert [(piece.rate, piece.seed) for piece in order[3:]] == [(1e-4, 1)]
    saved(study, results)
    assert list(pieces.missing(study, pieces.load(study))) == []


def test_a_search_does_not_try_a_rate_again(tmp_path):
    study = make(tmp_path, rates=(1e-3, 1.001e-3))  # a step further is 1e-3, rounded
    _, results = play(study, lambda piece: -piece.rate)
    assert pieces.chosen_rate(study, "sums", "lora", results) == 1.001e-3


def test_another_test_is_measured_without_training_again(tmp_path, monkeypatch):
    data = Data([], ["task.eval_path=a.jsonl"], 5, 8, 8)
    study = make(tmp_path, rates=[1e-3], seeds=[0], data={"sums": data})
    (piece,), results = play(study, lambda piece: 0.5)
    results[piece.key] |= {"tests": piece.tests(study), "test": {"loss": 9.0}, "peak_bytes": 7}
    saved(study, results)
    assert list(pieces.missing(study, pieces.load(study))) == []
    other = replace(study, data={"sums": replace(data, test=["task.eval_path=b.jsonl"])})
    loaded = pieces.load(other)
    assert list(pieces.missing(other, loaded)) == [piece]
    assert "test" not in loaded[piece.key]

    calls = []
    runner = running.Runner(other)
    monkeypatch.setattr(runner, "_call", lambda words, *rest: (calls.append(words), (0, 1))[1])
    numbers = {"validation": {}, "steps": 1, "seconds": 1.0}
    monkeypatch.setattr(runner, "_numbers", lambda piece, peak: numbers | {"peak_bytes": peak})
    monkeypatch.setattr(running.checkpoints, "complete", lambda folder: ["step 1"])
    runner.run(loaded)
    assert len(calls) == 1
    assert calls[0][1] == "task.eval_path=b.jsonl"
    written = json.loads((other.folder / "pieces" / f"{piece.key}.json").read_text())
    assert (written["tests"], written["peak_bytes"]) == (piece.tests(other), 7)


@pytest.mark.parametrize(("export", "loss"), [("last", 0.5), ("best", 0.1)])
def test_the_validation_is_that_of_the_exported_checkpoint(tmp_path, export, loss):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.json").write_text('{"step": 2}')
    (tmp_path / "run.yaml").write_text(f"config: {{export: {export}}}")
    rows = [{"step": step, "loss": loss} for step, loss in ((0, 1.0), (2, 0.1), (4, 0.5))]
    assert running._of_result(tmp_path, rows)["loss"] == loss
    assert running._of_result(tmp_path, []) == {}


def test_a_run_that_a_killed_study_left_is_waited_for(tmp_path, monkeypatch, capsys):
    study = make(tmp_path, rates=[1e-3], seeds=[0])
    (piece,) = pieces.missing(study, {})
    folder = study.folder / "runs" / piece.key
    folder.mkdir(parents=True)
    lock = (folder / ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    waits = []
    monkeypatch.setattr(running.time, "sleep", lambda _: (waits.append(1), lock.close()))
    runner = running.Runner(study)
    runner._wait_for_earlier(piece)  # until the process that holds the lock ends
    assert len(waits) == 1
    assert "waiting for its process of an earlier start" in capsys.readouterr().out
    runner._wait_for_earlier(piece)
    assert len(waits) == 1
