"""graft compare: columns are experiments, numbers are those of the journals, nothing leaves the
page."""

from __future__ import annotations

import json
import shutil
import statistics

import pytest
import yaml

from tests.conftest import ROOT
from tests.session.test_report_html import NASTY, Page
from tests.toys.commands import exit_code
from trainer import compare
from trainer.evaluation.run_summary import folders, summary
from trainer.session import compared
from trainer.storage.door import FolderError

OLD = ROOT / "tests" / "data" / "runs_0.1" / "runs"
LOSSES = {0: [2.0, 1.5, 1.0], 1: [2.0, 1.3, 1.4], 2: [2.0, 0.9, 0.8]}  # by seed, at steps 0, 4, 8


def make(folder, change=(), losses=(2.0, 1.0), **record):
    """A run folder as a run writes it, with evaluations every 4 steps."""
    content = yaml.safe_load((OLD / "lora" / "run.yaml").read_text())
    content |= record
    for key, value in dict(change).items():
        node = content["config"]
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    rows = []
    for at, loss in enumerate(losses):
        if at:
            for step in range(4 * at - 3, 4 * at + 1):
                rows.append(
                    {"kind": "step", "step": step, "loss": loss + 0.1, "lr": 0.01,
                     "tokens": 100 * step, "tokens_per_s": 50.0 + step, "seconds": 60.0 * step}
                )  # fmt: skip
        rows.append({"kind": "evaluation", "step": 4 * at, "loss": loss, "exact_match": 1 - loss})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Three seeds of one experiment, and one run of another with a larger adapter."""
    monkeypatch.chdir(tmp_path)
    for seed, losses in LOSSES.items():
        make(tmp_path / "runs" / f"small-seed{seed}", {"seed": seed, "name": f"s{seed}"}, losses)
    make(tmp_path / "runs" / "large", {"adapter.rank": 64, "name": "large"}, (2.0, 0.5))
    return tmp_path / "runs"


def test_seeds_of_one_experiment_are_one_column(sweep):
    groups = compared.grouped([summary(run) for run in folders(sweep)])
    assert [group.label for group in groups] == ["large", "small ×3"]  # noqa: RUF001
    assert compared.differing(groups) == {"adapter.rank": [64, 2]}
    table = {row[0]: row[1:] for row in compared.results_table(groups).rows}
    last = [losses[-1] for losses in LOSSES.values()]
    best = [min(losses) for losses in LOSSES.values()]
    for row, values in (("loss, last", last), ("loss, best", best)):
        mean, deviation = statistics.fmean(values), statistics.stdev(values)
        assert table[row][1] == f"{mean:.4f} ± {deviation:.4f}"
    assert table["loss, before"] == ["2.0000", "2.0000 ± 0.0000"]
    assert table["exact_match, best"][0] == "0.5000"
    assert table["best step"] == ["4", "4–8"]  # noqa: RUF001
    assert table["steps"] == ["4", "8"]
    assert table["tokens"] == ["400", "800"]
    assert table["training time"] == ["4.0 min", "8.0 min"]
    assert table["tokens/s"] == ["53", "55 ± 0"]  # the median of steps
    assert table["runs"] == ["1", "3"]


def test_the_best_step_is_that_of_the_monitor(tmp_path):
    change = {
        "callbacks.evaluation.monitor": "exact_match", "callbacks.evaluation.mode": "max",
    }  # fmt: skip
    run = summary(make(tmp_path / "a", change, (2.0, 0.5, 0.7)))
    assert run.best_row["step"] == 4
    assert run.best("loss") == 0.5
    assert summary(make(tmp_path / "b", {}, ())).best_row == {}


def test_settings_of_another_choice_are_not_listed(tmp_path):
    groups = compared.grouped([summary(OLD / name) for name in ("lora", "rosa")])
    listed = compared.differing(groups)
    assert listed["adapter"] == ["lora", "rosa"]
    own = {key for key in listed if key.startswith("adapter.")}
    assert own == {"adapter.alpha", "adapter.dropout"}  # which both have


@pytest.mark.long
def test_the_page_holds_all_and_leads_nowhere(sweep, capsys):
    make(sweep / "nasty", {"name": NASTY, "task.path": NASTY}, (2.0, 1.1))
    words = [*(str(run) for run in folders(sweep)), "markdown=table.md", "json=table.json"]
    assert exit_code(compare.main, words) == 0
    text = (sweep.parent / "compare.html").read_text("utf-8")
    page = Page(text)
    assert not page.handlers
    assert "script" not in page.tags
    assert all(address.startswith("data:image/svg+xml") for address in page.addresses)
    titles = ("held-out loss", "held-out loss over time", "training loss", "exact_match")
    assert all(f'alt="{title}"' in text for title in titles)
    assert "adapter.rank" in capsys.readouterr().out
    assert "| adapter.rank | 64 |" in (sweep.parent / "table.md").read_text("utf-8")
    groups = json.loads((sweep.parent / "table.json").read_text("utf-8"))
    assert groups[0]["held_out"]["loss"] == {"before": [2.0], "last": [0.5], "best": [0.5]}
    assert {key: groups[0]["settings"][key] for key in ("adapter.rank",)} == {"adapter.rank": 64}
    compared.write(compared.grouped([summary(run) for run in folders(sweep)]), sweep / "again.html")
    assert (sweep / "again.html").read_text("utf-8") == text


@pytest.mark.long
def test_a_folder_of_runs_a_sweeps_numbers_and_a_family(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for job in (10, 9):
        make(tmp_path / "lr=0.1" / str(job), {"optimizer.lr": job / 1000})
    assert [run.name for run in folders(tmp_path / "lr=0.1")] == ["9", "10"]
    assert exit_code(compare.main, ["lr=0.1", "out=null"]) == 0
    assert not list(tmp_path.glob("*.html"))
    shown = capsys.readouterr().out
    assert "lr=0.1/9" in shown
    assert "optimizer.lr" in shown
    trunk = make(tmp_path / "trunk", id="aaaa")
    make(tmp_path / "branch", {"max_steps": 3}, parent={"run": "trunk", "step": 4, "id": "aaaa"})
    make(tmp_path / "other", {"max_steps": 3}, parent={"run": "other", "step": 4, "id": "bbbb"})
    assert exit_code(compare.main, [f"family={trunk}", "out=null"]) == 0
    shown = capsys.readouterr().out
    assert "branch" in shown
    assert "other" not in shown


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "missing: the run folders to compare"),
        (["nowhere"], "nowhere is no run folder: it has no run.yaml"),
        (["runz/large"], "runz/large is no run folder"),
        (["runs/larg"], "Did you mean runs/large?"),
        (["."], "no run folder, and no folder of runs"),
        (["runs", "ot=x"], "ot=x: there is no such option. Did you mean out?"),
        (["runs", "out=nowhere/x.html"], "there is no folder nowhere"),
    ],
)
def test_bad_input_is_one_line(sweep, capsys, words, message):
    assert exit_code(compare.main, words) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert not list(sweep.parent.glob("*.html"))


@pytest.mark.long
def test_a_damaged_journal_and_a_run_that_has_not_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = make(tmp_path / "a")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": "x"}\n{"kind": "st')
    empty = make(tmp_path / "b", {"max_steps": 99})
    (empty / "metrics.jsonl").unlink()
    assert exit_code(compare.main, ["a", "b"]) == 0
    shutil.rmtree(empty)
    with pytest.raises(FolderError, match="no run folder, and holds none"):
        folders(tmp_path / "runs")
