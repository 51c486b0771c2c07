"""The real program on the tiny base, for each kind of task."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import write_rows
from trainer import journal


def test_chats_are_learnt_and_everything_is_written(train, chats):
    run = train(f"task.path={chats}", "callbacks.evaluation.generate=3", "max_steps=12")
    names = {path.name for path in run.iterdir()}
    assert {
        "run.yaml",
        "metrics.jsonl",
        "metrics.csv",
        "preflight.json",
        "samples.jsonl",
        "adapter",
        "checkpoints",
        "report.html",
    } <= names
    rows = journal.read(run / "metrics.jsonl")
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == list(range(1, 13))
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    assert evaluations[0]["step"] == 0
    assert evaluations[-1]["step"] == 12
    assert evaluations[-1]["loss"] < evaluations[0]["loss"] - 0.05
    assert "exact_match" in evaluations[-1]
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
