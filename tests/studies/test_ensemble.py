"""Mixtures of runs against loops over tokens, and by real runs."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from adapters.errors import AdapterError
from tests.conftest import write_rows
from tests.toys.commands import exit_code
from trainer import ensemble as verb
from trainer.studies import ensemble


def naive(logs: Any, posterior: bool, top: int) -> list[float]:
    """Token by token, with probabilities."""
    runs, weights, result = len(logs), [1.0] * len(logs), []
    for t in range(len(logs[0])):
        best = sorted(range(runs), key=lambda j: -weights[j])[:top]
        total = sum(weights[j] for j in best)
        p = sum(weights[j] / total * math.exp(logs[j][t]) for j in best)
        result.append(math.log(p))
        if posterior:
            weights = [w * math.exp(logs[j][t]) for j, w in enumerate(weights)]
    return result


@pytest.mark.parametrize("posterior", [True, False])
@pytest.mark.parametrize("runs", [1, 2, 4])
def test_the_mixture_against_a_loop(runs, posterior):
    logs = torch.randn(runs, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(runs))
    logs = -logs.abs()
    actual = ensemble.mixture(logs, posterior)
    torch.testing.assert_close(actual, torch.tensor(naive(logs.tolist(), posterior, runs)).double())
    if posterior and runs == 4:
        logs[:, 0] -= torch.arange(4) / 7  # no equal weights after the first token
        expected = naive(logs.tolist(), True, 2)[1:]
        actual = ensemble.mixture(logs, top=2)[1:]
        torch.testing.assert_close(actual, torch.tensor(expected).double())


def test_the_mixture_of_a_text_is_the_mean_of_the_runs_probabilities():
    logs = -torch.rand(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = ensemble.mixture(logs).sum()
    assert float(whole) == pytest.approx(float(logs.sum(1).logsumexp(0)) - math.log(3))
    assert float(whole) >= float(logs.sum(1).max()) - math.log(3)


def test_long_texts_do_not_underflow():
    logs = torch.full((2, 5000), -9.0, dtype=torch.float64)
    logs[1] -= 1
    mixed = ensemble.mixture(logs)
    assert mixed.isfinite().all()
    assert float(mixed[-1]) == pytest.approx(-9.0)


def test_a_route_reads_the_prompt_alone():
    logs = torch.tensor([[-1.0, -1.0, -9.0], [-1.0, -2.0, -0.1]])
    assert ensemble.route(logs, torch.tensor([False, False, True])) == 0
    assert ensemble.route(logs, torch.tensor([True, True, True])) == 0  # no prompt: the first
    assert ensemble.route(logs.flip(0), torch.tensor([False, False, True])) == 1


@pytest.fixture(scope="module")
def experts(train_in, tmp_path_factory):
    """A run on letters and one on digits, of one base."""
    place, runs = tmp_path_factory.mktemp("experts"), []
    for name, text in (("letters", "abc"), ("digits", "123")):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": text * (1 + i % 4)},
                    {"role": "assistant", "content": text[::-1] * (1 + i % 3)},
                ]
            }
            for i in range(40)
        ]
        path = write_rows(place / f"{name}.jsonl", rows)
        runs.append(
            train_in(
                place, f"task.path={path}", "task.eval_fraction=0.2", "max_steps=30",
                "max_epochs=null", "optimizer.lr=3e-2", "callbacks.evaluation.samples=0",
                "callbacks.evaluation.every=null", "report=false", "check_export=false",
                "task.train_on=everything", f"name={name}",
            )
        )  # fmt: skip
    return runs


def test_runs_know_their_own_rows(experts, tmp_path, capsys):
    out = tmp_path / "numbers.json"
    words = [f"runs=[{experts[0]},{experts[1]}]", "rows=6", f"json={out}"]
    assert exit_code(verb.main, words) == 0
    assert "routed to their run" in " ".join(capsys.readouterr().out.split())
    for own, part in enumerate(json.loads(out.read_text())):
        assert part["rows"] == 6
        assert part["runs"][own] < part["runs"][1 - own]
        assert part["mixture"] < part["uniform"] < part["runs"][1 - own]
        assert part["mixture"] < part["runs"][own] + math.log(2)
        at_best = min(part["runs"])
        assert part["route"] >= at_best - 1e-9


def test_a_runs_loss_is_that_of_its_evaluation(experts):
    from trainer.evaluation.run_metrics import run_metrics

    own = run_metrics(str(experts[0]), False, 0, 4, 8)["adapted"]["loss"]
    part = ensemble.measure([str(run) for run in experts], 99, None)[0]
    assert part["runs"][0] == pytest.approx(own, rel=1e-4)


def test_runs_of_other_bases_are_refused(experts, monkeypatch):
    read = ensemble.run_folder.read

    def other(run: str) -> Any:
        folder, content, which = read(run)
        if run == str(experts[1]):
            content["identity"]["base"] = "another"
        return folder, content, which

    monkeypatch.setattr(ensemble.run_folder, "read", other)
    with pytest.raises(AdapterError, match=r"letters and .*digits have different bases"):
        ensemble.measure([str(run) for run in experts], 2, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs=[a]"], "expected two or more"),
        (["runs=[a,a]"], "a run is there twice"),
        (["runs=[a,b]", "top=0"], "top=0: expected"),
        (["runs=[a,b]"], "is no run folder"),
    ],
)
def test_bad_arguments_are_named(words, message, capsys):
    assert exit_code(verb.main, words) == 2
    assert message in capsys.readouterr().err
