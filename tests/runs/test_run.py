"""The real program on the tiny base, for each kind of task."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import wandb
from safetensors.torch import load_file

from tests.conftest import ROOT, sums, write_rows
from trainer.storage import journal


def evaluations(run):
    return [row for row in journal.read(run / "metrics.jsonl") if row["kind"] == "evaluation"]


def test_chats_are_learnt_and_everything_is_written(train, chats):
    run = train(f"task.path={chats}", "callbacks.evaluation.generate=3", "max_steps=12")
    names = {path.name for path in run.iterdir()}
    expected = {
        "run.yaml",
        "metrics.jsonl",
        "metrics.csv",
        "preflight.json",
        "samples.jsonl",
        "adapter",
        "checkpoints",
        "report.html",
    }
    assert expected <= names
    steps = [row for row in journal.read(run / "metrics.jsonl") if row["kind"] == "step"]
    assert [row["step"] for row in steps] == list(range(1, 13))
    first, *_, last = evaluations(run)
    assert (first["step"], last["step"]) == (0, 12)
    assert last["loss"] < first["loss"] - 0.05
    assert last["perplexity"] == pytest.approx(math.exp(last["loss"]))
    assert "exact_match" in last
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    card = (run / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "loaded back by stock PEFT" in card
    assert str(run) not in card
    modes = {oct(path.stat().st_mode)[-3:] for path in run.rglob("*") if path.is_file()}
    assert modes == {"644"}
    assert config["peft_type"] == "LORA"
    assert config["target_modules"] == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]


def test_plain_text_and_packing(train, tmp_path):
    rows = write_rows(tmp_path / "text.jsonl", [{"text": "abc " * (3 + i % 9)} for i in range(80)])
    run = train(
        "task=completion", f"task.path={rows}", "packing=true", "max_length=64", "max_steps=10"
    )
    first, *_, last = evaluations(run)
    assert last["loss"] < first["loss"]
    checked = json.loads((run / "preflight.json").read_text())
    assert checked["run"]["packing_efficiency"] > 0.9


@pytest.mark.parametrize(
    ("overrides", "asks"),
    [
        ([], True),
        (["packing=false"], False),
        (["deterministic=true"], False),
        (["drafter=mtp_shared"], False),
        (["base.attn_implementation=sdpa"], False),
    ],
    ids=str,
)
def test_flash_attention_is_asked_for_where_rows_are_packed(
    train, chats, monkeypatch, overrides, asks
):
    requested = []
    monkeypatch.setattr(
        "trainer.session.model.use_flash", lambda *arguments: requested.append(arguments) or False
    )
    train(f"task.path={chats}", "packing=true", "max_steps=1", *overrides)
    assert bool(requested) is asks


def test_classification_with_a_new_head(train, tmp_path):
    rows = [
        {"text": "good " * (1 + i % 5) if i % 2 else "bad " * (1 + i % 5), "label": str(i % 2)}
        for i in range(120)
    ]
    path = write_rows(tmp_path / "labels.jsonl", rows)
    run = train(
        "task=classification",
        f"task.path={path}",
        "task.eval_fraction=0.2",
        "max_steps=30",
        "max_epochs=5",
    )
    last = evaluations(run)[-1]
    assert last["accuracy"] > 0.9
    assert last["f1"] > 0.9
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    assert any(name.endswith("score.weight") for name in saved)


def test_streaming_reads_rows_while_training(train, chats):
    run = train(
        f"task.path={chats}",
        "task.streaming=true",
        f"task.eval_path={chats}",
        "task.shuffle_block=16",
        "max_steps=6",
    )
    first, *_, last = evaluations(run)
    assert last["loss"] < first["loss"]


def test_a_stream_that_ends_early_says_so(train, chats):
    run = train(
        f"task.path={chats}",
        "task.streaming=true",
        "task.eval_fraction=0",
        "max_steps=50",
        "max_epochs=1",
        "batch_size=8",
    )
    rows = journal.read(run / "metrics.jsonl")
    # 60 rows, the last step smaller
    assert [row["step"] for row in rows if row["kind"] == "step"][-1] == 8
    assert [row["reason"] for row in rows if row["kind"] == "stopped"] == [
        "the data came to its end"
    ]


def test_no_adapter_evaluates_the_base(train, chats):
    run = train(f"task.path={chats}", "adapter=none", "callbacks.evaluation.generate=2")
    (only,) = evaluations(run)
    assert only["loss"] > 5  # a random model over 259 tokens: near log 259
    assert "exact_match" in only
    assert not (run / "adapter").exists()


def test_full_fine_tuning_moves_the_base(train, chats, tiny):
    run = train(
        f"task.path={chats}", "adapter=full", "max_steps=4", "callbacks.checkpoints.every=null"
    )
    saved = torch.load(next((run / "checkpoints").glob("*.ckpt")), weights_only=True)["adapter"][
        "tensors"
    ]
    before = tiny.load(torch.float32).state_dict()
    # tied to the embedding
    assert set(saved) == {name for name in before if name != "lm_head.weight"}
    assert all(
        not torch.equal(saved[name], before[name]) for name in saved if name.endswith("proj.weight")
    )


def test_training_stops_when_evaluation_gets_no_better(train, chats):
    run = train(
        f"task.path={chats}",
        "max_steps=60",
        "callbacks.evaluation.every=1",
        "callbacks.evaluation.patience=2",
        "optimizer.lr=0.2",
    )
    rows = journal.read(run / "metrics.jsonl")
    stopped = [row for row in rows if row["kind"] == "stopped"]
    assert "no better loss in 2 evaluations" in stopped[0]["reason"]
    assert stopped[0]["step"] < 60
    best = json.loads((run / "checkpoints" / "best.json").read_text())["step"]
    losses = {
        row["step"]: row["loss"] for row in rows if row["kind"] == "evaluation" and row["step"] > 0
    }
    assert best == min(losses, key=losses.get)
    assert (run / "checkpoints" / f"step-{best:08d}.ckpt").exists()


def test_the_time_limit_ends_a_run_well(train, chats):
    run = train(f"task.path={chats}", "max_steps=5000", "max_time=0.03")
    stopped = [row for row in journal.read(run / "metrics.jsonl") if row["kind"] == "stopped"]
    assert stopped[0]["reason"].startswith("max_time=0.03")
    assert (run / "report.html").exists()


def test_max_tokens_ends_after_the_step_that_reaches_them(train, chats):
    run = train(f"task.path={chats}", "max_steps=null", "max_tokens=500", "max_epochs=null")
    steps = [row for row in journal.read(run / "metrics.jsonl") if row["kind"] == "step"]
    assert steps[-1]["tokens"] >= 500
    assert steps[-2]["tokens"] < 500


def test_best_and_newest_checkpoints_are_kept(train, chats):
    run = train(
        f"task.path={chats}",
        "max_steps=12",
        "callbacks.checkpoints.every=2",
        "callbacks.checkpoints.keep=2",
    )
    steps = sorted(int(path.stem[5:]) for path in (run / "checkpoints").glob("*.ckpt"))
    best = json.loads((run / "checkpoints" / "best.json").read_text())["step"]
    assert steps == sorted({8, 10, 12, best})  # the cooldown begins after 8


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_keeps_the_adapter_in_fp32(train, chats, precision):
    run = train(f"task.path={chats}", f"precision={precision}", "max_steps=3")
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert any(tensor.abs().sum() > 0 for name, tensor in saved.items() if "lora_B" in name)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_bases_train(train, chats, quantization):
    run = train(
        f"task.path={chats}",
        f"base.quantization={quantization}",
        "max_steps=4",
        "base.hidden_size=64",
    )
    first, *_, last = evaluations(run)
    assert last["loss"] < first["loss"]


def test_metrics_can_be_followed_in_tensorboard(train, chats):
    run = train(f"task.path={chats}", "logger=tensorboard", "max_steps=2")
    assert list((run / "tensorboard").glob("events*"))


def test_wandb_falls_back_to_offline_under_the_runs_own_id(train, chats):
    run = train(f"task.path={chats}", "logger=wandb", "max_steps=2")
    import yaml

    run_id = yaml.safe_load((run / "run.yaml").read_text())["id"]
    assert list((run / "wandb").glob(f"offline-run-*-{run_id}"))


def test_a_second_run_of_the_name_gets_its_own_folder(train, chats):
    assert [train(f"task.path={chats}", "max_steps=1").name for _ in range(3)] == [
        "smoke",
        "smoke-2",
        "smoke-3",
    ]


def test_rows_held_out_are_never_trained(train, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", sums(50))
    run = train(f"task.path={rows}", "task.eval_fraction=0.2", "max_steps=1")
    checked = json.loads((run / "preflight.json").read_text())["data"]
    assert (checked["train"]["rows"], checked["eval"]["rows"]) == (40, 10)


def test_two_processes_are_one_run(warm_program, train, chats):
    settings = [f"task.path={chats}", "max_steps=4", "precision=fp32", "lightning=cpu"]
    train(*settings, "batch_size=4", "name=alone")
    two = ["batch_size=2", "name=both", "lightning.devices=2", "lightning.strategy=ddp"]
    both = warm_program("+experiment=smoke", *settings, *two, module="trainer")
    assert both.returncode == 0, both.stderr
    runs = chats.parent / "runs"
    assert sorted(path.name for path in runs.iterdir()) == ["alone", "both"]
    assert both.stdout.count("run folder:") == 1  # the first process speaks for all
    for one, other in zip(
        journal.read(runs / "alone/metrics.jsonl"),
        journal.read(runs / "both/metrics.jsonl"),
        strict=True,
    ):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_a_run_without_checkpoints_still_leaves_its_adapter(train, chats):
    run = train(f"task.path={chats}", "callbacks.checkpoints=null", "max_steps=2")
    assert load_file(run / "adapter" / "adapter_model.safetensors")
    assert not list((run / "checkpoints").iterdir())


def test_torchruns_processes_share_the_first_ones_folder(tmp_path, chats):
    leftovers = set(Path(tempfile.gettempdir()).glob("graft-*"))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "trainer",
        "+experiment=smoke",
        f"task.path={chats}",
        "max_steps=2",
        "batch_size=2",
        "precision=fp32",
        "lightning=cpu",
        "lightning.devices=2",
        "lightning.strategy=ddp",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["smoke"]
    assert done.stdout.count("run folder:") == 1
    assert [
        row["step"]
        for row in journal.read(tmp_path / "runs/smoke/metrics.jsonl")
        if row["kind"] == "evaluation"
    ][-1] == 2
    assert set(Path(tempfile.gettempdir()).glob("graft-*")) == leftovers


def test_a_wandb_run_ends_with_its_fit(train, chats):
    train(f"task.path={chats}", "logger=wandb", "logger.wandb.mode=offline", "max_steps=1")
    assert wandb.run is None  # otherwise a sweep's next run would write into it


def test_a_missing_file_is_told_without_a_traceback(program):
    done = program("+experiment=smoke", "task.path=nothere.jsonl")
    assert done.returncode == 2
    assert "there is no such file" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
