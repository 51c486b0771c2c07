"""Run folders of version 0.1.0 (tests/data/runs_0.1) can still be read, exported, asked, reported and resumed."""

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
    """A copy of the folders, with the paths that they record and the base that they were trained on."""
    shutil.copytree(DATA, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "runs"


def command(verb: str, *arguments: str) -> int:
    """The exit code of `python -m trainer.VERB ARGUMENTS`, run in this process."""
    return importlib.import_module(f"trainer.{verb}").main([*arguments])


def resume(train: Callable[..., Path], folder: Path, *more: str) -> Path:
    """Resume a run with the overrides that it was started with."""
    overrides = yaml.safe_load((folder / "run.yaml").read_text())["overrides"]
    given = [override for override in overrides if override.lstrip("+").partition("=")[0] not in ("experiment", "runs")]
    return train(*given, *more, "resume=auto")


def losses(folder: Path) -> dict[tuple[str, int], float]:
    """The loss of each step and each evaluation that the run has logged."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(row["kind"], row["step"]): row["loss"] for row in rows if row["kind"] in ("step", "evaluation")}


def weights(folder: Path) -> str:
    """The sha256 of the trained tensors in the last checkpoint, computed as make.py does."""
    content = torch.load(sorted((folder / "checkpoints").glob("step-*.ckpt"))[-1], weights_only=True)
    digest = hashlib.sha256()
    for name, tensor in sorted((content["adapter"]["tensors"] | content.get("drafter", {})).items()):
        digest.update(name.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_stopped_run_is_used_and_resumed(old_runs, train, capsys, name):
    folder = old_runs / name
    assert command("generate", f"run={folder}", "prompt=1+2=", "max_new_tokens=3") == 0
    to = "drafter" if name == "eagle3" else "peft"
    assert command("export", f"run={folder}", f"to={to}", "out=exported") == 0
    assert (Path("exported") / ("model.safetensors" if to == "drafter" else "adapter_model.safetensors")).exists()
    assert command("report", f"run={folder}") == 0
    assert name in (folder / "report.html").read_text()

    expected, before = EXPECTED[name], losses(folder)
    assert max(step for _, step in before) == expected["stopped"]
    assert resume(train, folder) == folder
    after = losses(folder)
    assert {place: after[place] for place in before} == before
    # Another processor adds up in another order, which Adam's first steps enlarge.
    assert after == pytest.approx({(row["kind"], row["step"]): row["loss"] for row in expected["rows"]}, rel=1e-4)
    if SAME_MACHINE:
        assert weights(folder) == expected["weights"]
