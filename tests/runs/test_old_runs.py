"""Run folders of version 0.1.0 (tests/data/runs_0.1) can be read, exported and resumed."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

DATA = Path(__file__).resolve().parent.parent / "data" / "runs_0.1"
EXPECTED: dict[str, dict[str, Any]] = json.loads((DATA / "expected.json").read_text())
# Set it on the machine that made the folders, to compare the trained weights bit by bit.
SAME_MACHINE = "GRAFT_OLD_RUNS_BITS" in os.environ


@pytest.fixture
def old_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folders, with the paths and the base that they record."""
    shutil.copytree(DATA, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "runs"


def command(verb: str, *arguments: str) -> int:
    """The exit code of `python -m trainer.VERB ARGUMENTS`, run in this process."""
    return importlib.import_module(f"trainer.{verb}").main([*arguments])


def start(train: Callable[..., Path], folder: Path, *more: str) -> Path:
    """Start the program with a run's overrides: it resumes the run, unless `more` renames it."""
    overrides = yaml.safe_load((folder / "run.yaml").read_text())["overrides"]
    values = [
        override
        for override in overrides
        if override.lstrip("+").partition("=")[0] not in ("experiment", "runs")
    ]
    return train(*values, "resume=auto", *more)


def losses(folder: Path) -> dict[tuple[str, int], float]:
    """The loss of each step and each evaluation that the run has logged."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        (row["kind"], row["step"]): row["loss"]
        for row in rows
        if row["kind"] in ("step", "evaluation")
    }


def weights(folder: Path) -> str:
    """The sha256 of the trained tensors in the last checkpoint, computed as make.py does."""
    content = torch.load(
        sorted((folder / "checkpoints").glob("step-*.ckpt"))[-1], weights_only=True
    )
    digest = hashlib.sha256()
    for name, tensor in sorted(
        (content["adapter"]["tensors"] | content.get("drafter", {})).items()
    ):
        digest.update(
            name.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def expected_losses(name: str) -> Any:
    """The losses of a run that nobody stopped.

    Another processor adds in another order, which Adam's first steps enlarge."""
    rows = {(row["kind"], row["step"]): row["loss"] for row in EXPECTED[name]["rows"]}
    return pytest.approx(rows, rel=1e-4)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_stopped_run_is_used_and_resumed(old_runs, train, caplog, name):
    folder, states = old_runs / name, sorted(Path("states").iterdir())
    written = [file.stat().st_mtime_ns for file in states]
    assert command("generate", f"run={folder}", "prompt=1+2=", "max_new_tokens=3") == 0
    to = "drafter" if name == "eagle3" else "peft"
    assert command("export", f"run={folder}", f"to={to}", "out=exported") == 0
    assert (
        Path("exported") / ("model.safetensors" if to == "drafter" else "adapter_model.safetensors")
    ).exists()
    assert command("report", f"run={folder}") == 0
    assert name in (folder / "report.html").read_text()

    before = losses(folder)
    assert max(step for _, step in before) == EXPECTED[name]["stopped"]
    assert start(train, folder) == folder
    after = losses(folder)
    assert {place: after[place] for place in before} == before
    assert after == expected_losses(name)
    if SAME_MACHINE:
        assert weights(folder) == EXPECTED[name]["weights"]
    assert "could not be verified" not in caplog.text  # the rows were compared by digest
    assert [file.stat().st_mtime_ns for file in states] == written


@pytest.mark.parametrize("name", ["branch", "eagle3"])
def test_a_finished_run_can_be_branched_off_and_be_a_target(old_runs, train, name):
    again = start(train, old_runs / name, "name=again")
    assert again == old_runs / "again"
    assert losses(again) == expected_losses(name)


def test_rows_that_are_no_longer_cached_are_compared_by_their_counts(old_runs, train, caplog):
    shutil.rmtree("cache/tokens")
    assert losses(start(train, old_runs / "eagle3")) == expected_losses("eagle3")
    for place in (
        "eagle3: the rows of train",
        "eagle3: the rows of eval",
        "states: the rows of these states",
    ):
        assert f"{place} could not be verified by digest" in caplog.text


@pytest.mark.parametrize(("change", "cached"), [(("1", "2"), True), (("+", "++"), False)])
def test_other_rows_are_refused(old_runs, train, change, cached):
    """In the first case their counts are the same."""
    rows = Path("rows.jsonl")
    rows.write_text(rows.read_text().replace(*change))
    if not cached:
        shutil.rmtree("cache/tokens")
    with pytest.raises(
        RuntimeError, match="data: the rows of train, or how they are tokenised, have changed"
    ):
        start(train, old_runs / "lora")
