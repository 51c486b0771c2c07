"""A study from its file to its table, through the real program."""

from __future__ import annotations

import json
import sys

import pytest
import yaml

from tests.conftest import write_rows
from tests.toys.commands import exit_code
from trainer import study

METAMATH = "The answer is: {}"


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A study of a tiny base, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name, count in (("train", 40), ("valid", 6), ("test", 5)):
        rows = [
            {"query": f"{n} and {len(name)}?", "response": METAMATH.format(n + len(name))}
            for n in range(count)
        ]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    content = {
        "name": "tiny",
        "parameters": 3000,
        "folder": str(tmp_path),
        "overrides": ["base=tiny", "lightning=cpu", "max_epochs=null", "max_steps=3"],
        "data": {
            "sums": {
                "overrides": [
                    "task=metamath",
                    "task.path={folder}/train.jsonl",
                    "task.eval_path={folder}/valid.jsonl",
                    "batch_size=2",
                ],
                "test": "{folder}/test.jsonl",
                "generate": 5,
                "max_new_tokens": 4,
            }
        },
        "methods": {
            "lora": ["adapter=lora"],
            "bad": {"overrides": ["adapter=lora", "lightning.accelerator=gpu"], "solve": False},
        },
        "rates": [1e-3],
        "seeds": [0],
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.run
def test_a_study_runs_ends_in_a_table_and_is_extended(
    file, tmp_path, capsys, monkeypatch, warm_python
):
    monkeypatch.setattr(sys, "executable", warm_python)  # of the processes of its runs
    assert study.main([str(file), "dry=true"]) == 0
    planned = capsys.readouterr().out
    assert planned.count("graft ") == 2
    assert not (tmp_path / "runs").exists()
    assert study.main([str(file), "board=board", "threads=1"]) == 0
    shown = capsys.readouterr().out
    assert "sums-bad-0.001-0: failed with" in shown  # and the study continues
    folder = tmp_path / "runs" / "tiny"
    result = json.loads((folder / "pieces" / "sums-lora-0.001-0.json").read_text())
    assert result["steps"] == 3
    assert abs(result["parameters"] - 3000) < 150
    assert {"loss", "exact_match"} <= result["test"].keys()
    file_of_rows = folder / "runs" / "sums-lora-0.001-0" / "test_rows.jsonl"
    rows = [json.loads(line) for line in file_of_rows.read_text().splitlines()]
    assert len(rows) == 5
    tokens = sum(row["tokens"] for row in rows)
    loss = sum(row["loss"] * row["tokens"] for row in rows) / tokens
    assert loss == pytest.approx(result["test"]["loss"], rel=1e-4)  # of the test rows
    assert loss != pytest.approx(result["validation"]["loss"], rel=1e-4)
    assert "| lora | 0.001 | 1 |" in (folder / "study.md").read_text()
    (written,) = (tmp_path / "board").iterdir()
    record = json.loads(written.read_text())
    assert set(record) == {"run_info", "train_info", "meta_info"}
    assert record["train_info"]["metrics"][-1]["test accuracy"] == result["test"]["exact_match"]
    assert record["run_info"]["train_config"]["max_steps"] == 3

    # nothing is left; a further method is
    before = sorted(path.stat().st_mtime_ns for path in (folder / "pieces").iterdir())
    methods = "study.methods={lora: [adapter=lora], rslora: [adapter=rslora]}"
    assert study.main([str(file), methods, "dry=true"]) == 0
    assert capsys.readouterr().out.count("adapter=rslora") == 1
    assert study.main([str(file), "table=true"]) == 0
    assert sorted(path.stat().st_mtime_ns for path in (folder / "pieces").iterdir()) == before
    # other settings under the same name are refused
    assert exit_code(study.main, [str(file), "max_steps=4"]) == 2
    assert "is the result of a run with other settings" in capsys.readouterr().err


@pytest.mark.long
def test_jobs_of_a_study_are_an_array_with_a_task_for_each_run(file, capsys):
    words = [str(file), "submit=true", "dry=true", "study.seeds=[0,1]", "slurm.time=10"]
    words += ["study.methods={lora: [adapter=lora]}"]
    assert study.main(words) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-1" in script
    for number in (0, 1):
        line = next(line for line in script.splitlines() if line.strip().startswith(f"{number})"))
        assert f"piece=sums-lora-0.001-{number} resume=auto" in line
        assert f"study file={file}" in line
        assert "submit" not in line


@pytest.mark.long
def test_faults_come_before_the_first_run(file, capsys):
    for words, message in (
        (["study.parameters=1"], "methods.lora: adapter.rank=1 has"),
        (["study.rates=[fast]"], "the rate 'fast' is no number above 0"),
        (["study.folder=nothere"], "nothere/train.jsonl"),
        (["table=true"], "table=true: no run of this study has ended"),
        (["slurm.time=3"], "slurm.time=3: settings of SLURM need submit=true"),
        (["gpus=0", "parallel=2"], "parallel=2: 1 GPUs have room for as many runs"),
    ):
        assert exit_code(study.main, [str(file), *words]) == 2
        assert message in capsys.readouterr().err
    assert exit_code(study.main, ["nothere"]) == 2
    assert "nothere: there is no such file, or one of methods" in capsys.readouterr().err
