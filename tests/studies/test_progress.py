"""The lines of a study while its runs have processes."""

from __future__ import annotations

import json
import time

from tests.studies.test_pieces import make
from trainer.studies import pieces, progress, running


def write(run, steps, total=600):
    run.mkdir(parents=True, exist_ok=True)
    (run / "preflight.json").write_text(json.dumps({"run": {"steps": total}}))
    rows = [{"kind": "evaluation", "step": 0, "loss": 3.0, "seconds": 9.0}]
    rows += [{"kind": "step", "step": step, "seconds": 2.0 * step} for step in steps]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_is_described_by_its_files(tmp_path):
    run = tmp_path / "run"
    assert progress.position(run) == "starting"
    write(run, [])
    assert progress.position(run) == "starting"
    write(run, [1, 2, 150])
    assert progress.position(run) == "step 150 of 600, 15 min left"  # 2 s a step
    write(run, [150], total=None)
    assert progress.position(run) == "step 150"
    write(run, [599, 600])
    assert progress.position(run) == "step 600, in its evaluation"
    write(run, [150])
    with (run / "metrics.jsonl").open("a") as file:  # of max_time
        file.write(json.dumps({"kind": "evaluation", "step": 150, "loss": 1.0, "seconds": 3.0}))
    assert progress.position(run) == "step 150, in its evaluation"


def test_a_study_says_where_its_runs_are(tmp_path, monkeypatch, capsys):
    study = make(tmp_path, rates=[1e-3], seeds=[0])
    (piece,) = pieces.missing(study, {})
    write(study.folder / "runs" / piece.key, [30], total=60)
    runner = running.Runner(study)
    monkeypatch.setattr(running, "REPORT", 0.02)

    def call(words, log, *rest):
        time.sleep(0.2)
        log.write_text("it failed")
        return 1, 0

    monkeypatch.setattr(runner, "_call", call)
    runner.run({})
    started, first, *_, last = capsys.readouterr().out.splitlines()
    assert started.startswith(f"{piece.key}: started, its log is {study.folder}")
    assert first == f"running: {piece.key}: step 30 of 60, 1 min left. Ended: 0"
    assert last.startswith(f"{piece.key}: failed with 1")
