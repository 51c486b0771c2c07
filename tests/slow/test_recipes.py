"""Recipes of conf/experiment on the real small base and real rows, cut to a few steps: each task
and each method once. tests/test_configs.py composes all of them."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from tests.conftest import ROOT
from trainer.storage import journal

DATA = ROOT.parent / "shared" / "data"
MASK = ["adapter.warmup_steps=1", "adapter.mask_steps=1", "adapter.count_mask_steps=true"]
SHORT = {
    "rosa_gsm8k": ("gsm8k_train.jsonl", MASK),
    "rosa_sql": ("sql_train.jsonl", MASK),
    "spiel_viggo": (
        "viggo_train.jsonl",
        ["adapter.reselection_steps=3", "adapter.accumulation_steps=2"],
    ),
    "deft_sst2": ("sst2_train.tsv", []),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not there"),
]


@pytest.mark.parametrize("name", SHORT)
def test_a_recipe_trains_and_its_adapter_loads_back(program, tmp_path, name):
    file, overrides = SHORT[name]
    done = program(
        f"+experiment={name}",
        f"task.path={DATA / file}",
        "task.limit=200",
        "task.eval_limit=4",
        "max_steps=4",
        "max_epochs=null",
        "batch_size=2",
        "accumulate=1",
        "schedule.warmup=1",
        "callbacks.evaluation.generate=0",
        "callbacks.evaluation.samples=0",
        "callbacks.evaluation.every=null",
        "logger=none",
        *overrides,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = " ".join(done.stdout.split())  # lines are wrapped where a path is long
    assert "loaded back by stock PEFT: logits differ by" in text
    run = tmp_path / "runs" / name
    steps = journal.read(run / "metrics.jsonl")
    assert [row["step"] for row in steps if row["kind"] == "step"] == [1, 2, 3, 4]
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    if name.startswith("deft"):
        assert all(0 < row["density"] < 1 for row in steps if row["kind"] == "step")
        return
    assert any(
        key.endswith("supertuning_values") and tensor.any() for key, tensor in tensors.items()
    )
    assert [row["step"] for row in steps if row["kind"] == "adapter"] == [2]
