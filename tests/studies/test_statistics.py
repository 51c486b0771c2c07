"""The numbers of a study's table, against formulas written out."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from tests.studies.test_pieces import make, play
from trainer.studies import page, statistics
from trainer.studies.plan import Method


def test_an_interval_over_seeds_is_students():
    values = [0.1, 0.3, 0.2]
    low, high = statistics.over_seeds(values)
    half = 4.302653 * 0.1 / math.sqrt(3)  # t of 2 degrees of freedom at 97.5 %
    assert (low, high) == pytest.approx((0.2 - half, 0.2 + half), abs=1e-4)
    assert statistics.over_seeds([0.1]) is None
    stats = pytest.importorskip("scipy.stats")
    for degrees, value in enumerate(statistics.T975, 1):
        assert value == pytest.approx(stats.t.ppf(0.975, degrees), abs=1e-3)


def test_an_interval_over_rows_is_the_bootstraps():
    # of two rows, the means of all four resamples are known: 0, 1/2, 1/2, 1
    assert statistics.over_rows([0.0, 1.0]) == (0.0, 1.0)
    values = np.random.default_rng(3).normal(0.5, 2.0, 400)
    low, high = statistics.over_rows(values.tolist())
    half = 1.96 * values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=0.03)
    assert high == pytest.approx(values.mean() + half, abs=0.03)
    assert statistics.over_rows([1.0]) is None


ROWS = {  # of each method, seed and row: (loss, tokens, score)
    ("lora", 0): [(1.0, 2, 0), (2.0, 6, 1), (3.0, 4, 0)],
    ("lora", 1): [(1.5, 2, 0), (2.5, 6, 1), (3.0, 4, 1)],
    ("rosa", 0): [(0.5, 2, 1), (2.5, 6, 1), (2.0, 4, 1)],
    ("rosa", 1): [(1.0, 2, 0), (2.0, 6, 0), (2.5, 4, 1)],
}


@pytest.fixture
def ended(tmp_path):
    """A study of two methods with two seeds, and its results."""
    study = make(
        tmp_path,
        methods={
            "lora": Method(["adapter=lora"], 0.5, True, [1e-3]),
            "rosa": Method(["adapter=rosa"], 0.5, True, [7e-4]),
        },
    )
    _, results = play(study, lambda piece: 2.0)
    for key, result in results.items():
        piece = result["piece"]
        rows = ROWS[piece["method"], piece["seed"]]
        tokens = sum(row[1] for row in rows)
        loss = sum(row[0] * row[1] for row in rows) / tokens
        result |= {
            "test": {"loss": loss, "exact_match": sum(row[2] for row in rows) / 3},
            "parameters": 100,
            "step_seconds": 0.5,
            "peak_bytes": 2_000_000,
            "adapter_bytes": 400,
            "steps": 8,
            "seconds": 4.0,
        }
        run = study.folder / "runs" / key
        run.mkdir(parents=True)
        (run / "test_rows.jsonl").write_text(
            "".join(
                json.dumps(
                    {
                        "where": f"row {n}",
                        "loss": a,
                        "tokens": b,
                        "scores": {"exact_match": c},
                        "answer": "a\u2028b",
                    },
                    ensure_ascii=False,
                )
                + "\n"
                for n, (a, b, c) in enumerate(rows)
            )
        )
    return study, results


def test_differences_are_paired_by_seed_and_by_row(ended):
    numbers = statistics.summary(*ended)["sums"]
    assert numbers["lora"]["metrics"]["exact_match"] == pytest.approx((0.5, 0.2357), abs=1e-4)
    assert "against" not in numbers["lora"]
    against = numbers["rosa"]["against"]
    differences = [
        sum((mine[0] - theirs[0]) * mine[1] for mine, theirs in zip(*rows, strict=True)) / 12
        for rows in ((ROWS["rosa", seed], ROWS["lora", seed]) for seed in (0, 1))
    ]
    assert against["loss"]["difference"] == pytest.approx(sum(differences) / 2)
    low, high = against["loss"]["over_seeds"]
    assert low < against["loss"]["difference"] < high
    # all resamples of three rows, each weighted by its tokens
    by_row = [
        sum(ROWS["rosa", s][n][0] - ROWS["lora", s][n][0] for s in (0, 1)) / 2 * tokens / 4
        for n, tokens in enumerate((2, 6, 4))
    ]
    means = [sum(draw) / 3 for draw in itertools.product(by_row, repeat=3)]
    assert against["loss"]["over_rows"] == pytest.approx((min(means), max(means)), abs=1e-6)
    # row 0 and 2 of seed 0 are won; row 1 of seed 1 is lost
    assert (against["exact_match"]["wins"], against["exact_match"]["losses"]) == (2, 1)


def test_the_page_has_the_table_the_curves_and_the_commands(ended):
    study, results = ended
    results["sums-lora-9-0"] = {
        "piece": {"data": "sums", "method": "lora", "rate": 9.0, "seed": 0, "searches": False},
        "words": [],
        "failed": 2,
        "message": "the <loss> was not finite",
    }
    text = page.write(study, results)
    assert "| rosa | 0.0007 | 2 | 100 |" in text
    assert "| 2 : 1 |" in text
    assert "There is no test set: the rows that chose the rate are those of the table." in text
    html = (study.folder / "study.html").read_text()
    assert html.count("data:image/svg+xml;base64,") == 2
    assert "the &lt;loss&gt; was not finite" in html
    commands = (study.folder / "commands.sh").read_text().splitlines()
    assert len(commands) == 9  # four runs, each with its test, and one that failed
    assert commands[1].startswith("graft evaluate run=runs/sums-lora-0.001-0 generate=0 ")
    assert any("adapter=rosa optimizer.lr=0.0007 seed=1" in command for command in commands)
    assert (study.folder / "study.md").read_text().startswith("# mine\n")


def test_rows_of_further_sets_and_runs_with_another_test_are_left_out(ended):
    study, results = ended
    before = statistics.summary(study, results)["sums"]["rosa"]["against"]["loss"]["over_rows"]
    for key in results:  # as task.eval_sets adds them
        other = {"where": "hard 1", "loss": 1.0 + ("rosa" in key), "tokens": 9, "scores": {}}
        with (study.folder / "runs" / key / "test_rows.jsonl").open("a") as file:
            file.write(json.dumps(other | {"set": "hard"}) + "\n")
    numbers = statistics.summary(study, results)["sums"]["rosa"]
    assert numbers["against"]["loss"]["over_rows"] == before
    del results["sums-rosa-0.0007-1"]["test"]
    results["sums-rosa-0.0007-1"]["untested"] = True
    assert statistics.summary(study, results)["sums"]["rosa"]["seeds"] == 1
    assert "1 runs were tested with other settings and are left out." in page.write(study, results)


def test_unequal_steps_are_noted_and_a_single_step_has_no_time(ended):
    study, results = ended
    assert "The methods differ in `steps`" not in page.write(study, results)
    for key, result in results.items():
        result |= {"steps": 9 if "rosa" in key else 1, "step_seconds": None}
    text = page.write(study, results)
    assert "The methods differ in `steps`" in text
    assert "inf" not in text


def test_curves_are_means_over_seeds_and_windows():
    runs = [[{"step": n, "loss": float(n)} for n in range(1, 5)], [{"step": 2, "loss": 4.0}]]
    means = page.averaged(runs)
    assert means == [(1, 1.0), (2, 3.0), (3, 3.0), (4, 4.0)]
    long = [(n, float(n % 2)) for n in range(1, 101)]
    assert [step for step, _ in page.smoothed(long)][:2] == [5, 10]
    assert page.smoothed(long)[0][1] == pytest.approx(3 / 5)
