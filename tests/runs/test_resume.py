"""A run that was cut off and resumed ends with the same bits as an undisturbed one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
import yaml

from tests.conftest import ROOT, sums, write_rows
from tests.toys.power_cuts import PowerCut, cut_at, outcome
from trainer.session import failures, report_html, start_point
from trainer.session.session import Session
from trainer.storage import checkpoints, journal
from trainer.storage.checkpoints import CheckpointError

COMMON = (
    "max_steps=11",
    "batch_size=4",
    "callbacks.checkpoints.every=3",
    "callbacks.evaluation.every=4",
    "callbacks.evaluation.generate=1",
    "callbacks.evaluation.max_new_tokens=8",
    "check_export=false",
    "report=false",
)


CASES = {
    "lora with dropout": ("adapter.dropout=0.3",),
    "accumulation": ("accumulate=3", "batch_size=2", "adapter.dropout=0.3"),
    "loading in a process": ("workers=1",),
    "packing": ("packing=true", "max_length=64"),
    "length groups": ("group_by_length=true",),
    "several epochs": ("max_epochs=null", "task.limit=20"),
    "a share of the rows": ("max_epochs=null", "repeat_random=0.3"),
    "adalora": ("adapter=adalora", "adapter.tfinal=2"),
    "pissa": ("adapter=pissa", "adapter.r=4"),
    "shira": ("adapter=shira", "adapter.r=2"),
    "prompt tuning": ("adapter=prompt_tuning", "adapter.num_virtual_tokens=4"),
    "8-bit optimiser": ("optimizer=adamw_8bit", "base.hidden_size=64"),
    "full": ("adapter=full", "optimizer.lr=1e-3"),
    "bf16": ("precision=bf16-true",),
}


# Cut off again after they were resumed.
TWICE = ("lora with dropout", "accumulation", "adalora")


@pytest.mark.parametrize("case", CASES)
def test_resumed_ends_as_uninterrupted(train, chats, monkeypatch, case):
    settings = (f"task.path={chats}", *COMMON, *CASES[case])
    expected = outcome(train(*settings, "name=alone"))
    for step in (5, 8) if case in TWICE else (8,):
        with monkeypatch.context() as patch:
            cut_at(patch, step)
            with pytest.raises(PowerCut):
                train(*settings, "name=cut", "resume=auto")
    actual = outcome(train(*settings, "name=cut", "resume=auto"))
    assert actual[1] == expected[1]
    assert actual[2] == expected[2]
    assert actual[0].keys() == expected[0].keys()
    assert all(torch.equal(actual[0][name], expected[0][name]) for name in expected[0])
    assert expected[1][-1]["loss"] != expected[1][0]["loss"]


def test_a_stream_goes_on_where_it_stopped(train, chats, monkeypatch):
    settings = (
        f"task.path={chats}",
        f"task.eval_path={chats}",
        "task.streaming=true",
        "task.shuffle_block=16",
        *COMMON,
    )
    expected = outcome(train(*settings, "name=alone"))
    with monkeypatch.context() as patch:
        cut_at(patch, 7)
        with pytest.raises(PowerCut):
            train(*settings, "name=cut", "resume=auto")
    actual = outcome(train(*settings, "name=cut", "resume=auto"))
    assert actual[1] == expected[1]
    assert all(torch.equal(actual[0][name], expected[0][name]) for name in expected[0])


def test_a_damaged_newest_checkpoint_costs_only_its_steps(train, chats, monkeypatch, caplog):
    settings = (f"task.path={chats}", *COMMON)
    expected = outcome(train(*settings, "name=alone"))
    with monkeypatch.context() as patch:
        cut_at(patch, 8)
        with pytest.raises(PowerCut):
            train(*settings, "name=cut")
    folder = (chats.parent / "runs" / "cut" / "checkpoints").resolve()
    newest = checkpoints.complete(folder)[-1].path
    newest.write_bytes(newest.read_bytes()[:-100])
    actual = outcome(train(*settings, "name=cut", "resume=auto"))
    assert "is damaged" in caplog.text
    assert all(torch.equal(actual[0][name], expected[0][name]) for name in expected[0])


@pytest.fixture(scope="module")
def stopped(train_in, tmp_path_factory):
    """Where a run stopped in its last step, and its settings."""
    folder = tmp_path_factory.mktemp("stopped")
    rows = write_rows(folder / "chats.jsonl", sums(60))
    settings = (f"task.path={rows}", *COMMON)
    with pytest.MonkeyPatch.context() as patch:
        cut_at(patch, 10)
        with pytest.raises(PowerCut):
            train_in(folder, *settings)
    return folder, settings


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("adapter.rank=4", "adapter.rank: 16 in the run, 4 now"),
        ("optimizer.lr=1e-3", "optimizer.lr"),
        ("seed=1", "seed"),
        ("base.seed=1", "base"),
        ("batch_size=2", "batch_size"),
        ("max_steps=10", "steps: 11 in the run, 10 now"),  # a cooldown's rates depend on the length
    ],
)
def test_another_config_is_refused(train_in, stopped, changed, named):
    folder, settings = stopped
    with pytest.raises(CheckpointError, match="cannot be resumed as this one") as refusal:
        train_in(folder, *settings, changed, "resume=auto")
    assert named in str(refusal.value)
    assert failures.explained(refusal.value, {}) == (str(refusal.value), 2)


def test_a_run_of_an_older_version_goes_on(train, chats, monkeypatch, caplog):
    caplog.set_level("INFO", "trainer")
    settings = (f"task.path={chats}", *COMMON)
    with monkeypatch.context() as patch:
        cut_at(patch, 3)
        with pytest.raises(PowerCut):
            train(*settings)
    (file,) = chats.parent.rglob("run.yaml")
    older = yaml.safe_load(file.read_text())
    del older["config"]["fused"], older["config"]["adapter"]["rank"], older["config"]["requeue"]
    file.write_text(yaml.safe_dump(older))
    with pytest.raises(CheckpointError, match=r"adapter\.rank: 16 in the run, 4 now"):
        train(*settings, "adapter.rank=4", "resume=auto")
    with monkeypatch.context() as patch:
        cut_at(patch, 4)
        with pytest.raises(PowerCut):
            train(*settings, "fused=false", "resume=auto")
    assert "was written by an older version and lacks requeue, fused, adapter.rank" in caplog.text
    assert "resuming after step 3" in caplog.text


def test_other_data_is_refused(train, tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "rows.jsonl", sums(40))
    with monkeypatch.context() as patch:
        cut_at(patch, 6)
        with pytest.raises(PowerCut):
            train(f"task.path={rows}", *COMMON)
    moved = rows.rename(tmp_path / "moved.jsonl")
    with monkeypatch.context() as patch:
        cut_at(patch, 8)
        with pytest.raises(PowerCut):  # the same rows elsewhere
            train(f"task.path={moved}", *COMMON, "resume=auto")
    write_rows(rows, sums(40, seed=1))
    with pytest.raises(CheckpointError, match=r"(?s)task\.path: .*data: the rows of train"):
        train(f"task.path={rows}", *COMMON, "resume=auto")


def test_places_are_compared_by_what_they_hold():
    config = {"task": {"parts": {"sql": {}}}}
    assert start_point._places(config, False, True) == ("base.path",)
    free = start_point._places(config, True, False)
    assert {"task.path", "task.parts.sql.path", "task.parts.sql.eval_path"} <= {*free}
    assert "base.path" not in free


def test_a_constant_run_can_be_made_longer(train, chats):
    settings = (f"task.path={chats}", *COMMON, "schedule=constant", "schedule.warmup=2")
    whole = outcome(train(*settings, "max_steps=9", "name=alone"))
    train(*settings, "max_steps=6", "name=longer")
    longer = outcome(train(*settings, "max_steps=9", "name=longer", "resume=auto"))
    assert longer[2]["step"] == 9
    assert all(torch.equal(longer[0][name], whole[0][name]) for name in whole[0])


def test_a_finished_run_is_left_alone(train, chats):
    settings = COMMON
    run = train(f"task.path={chats}", *settings)
    assert not (run / "report.html").exists()
    before = (run / "metrics.jsonl").read_text()
    recorded = yaml.safe_load((run / "run.yaml").read_text())
    assert train(f"task.path={chats}", *settings, "resume=auto") == run
    assert yaml.safe_load((run / "run.yaml").read_text()) == recorded
    moved = shutil.copy(chats, chats.with_name("moved.jsonl"))  # it is found there from now on
    train(f"task.path={moved}", *settings, "resume=auto")
    recorded["config"]["task"]["path"] = str(moved)
    assert yaml.safe_load((run / "run.yaml").read_text()) == recorded
    assert (run / "metrics.jsonl").read_text() == before
    del recorded["finished"]  # an older version, which had the report alone to go by
    (run / "run.yaml").write_text(yaml.safe_dump(recorded))
    (run / "report.html").touch()
    train(f"task.path={moved}", *settings, "resume=auto")
    assert yaml.safe_load((run / "run.yaml").read_text()) == recorded


def test_a_report_does_not_finish_a_run(train, chats, monkeypatch):
    settings = (f"task.path={chats}", *COMMON, "max_steps=2")
    with monkeypatch.context() as patch:
        patch.setattr(Session, "save_results", lambda *_: (_ for _ in ()).throw(PowerCut))
        with pytest.raises(PowerCut):
            train(*settings)
    run = chats.parent / "runs" / "smoke"
    report_html.write(run)
    train(*settings, "resume=auto")
    assert (run / "adapter").exists()


def start(python, tmp_path, rows, *extra):
    command = [
        python,
        "-m",
        "trainer",
        "+experiment=smoke",
        f"task.path={rows}",
        f"runs={tmp_path / 'runs'}",
        "max_steps=4000",
        "precision=fp32",
        "resume=auto",
        "callbacks.checkpoints.every=null",
        *extra,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=tmp_path,
    )


def wait_for_steps(run, process):
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if any(
            row["kind"] == "step" and row["step"] > 3 for row in journal.read(run / "metrics.jsonl")
        ):
            return
        time.sleep(0.05)
    raise AssertionError(process.communicate()[0])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_step_and_says_how_to_go_on(warm_python, tmp_path, chats, number, code):
    run = tmp_path / "runs" / "smoke"
    process = start(warm_python, tmp_path, chats)
    try:
        wait_for_steps(run, process)
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    assert "Resume with resume=" in said
    saved = checkpoints.newest(run / "checkpoints")
    steps = [row["step"] for row in journal.read(run / "metrics.jsonl") if row["kind"] == "step"]
    assert saved.step == steps[-1]  # no step is lost
    other = (f"max_steps={steps[-1] + 2}", "schedule=constant", "schedule.warmup=0")
    again = start(warm_python, tmp_path, chats, *other)
    assert again.wait(timeout=120) != 0  # another schedule: refused
    again.stdout.close()
    assert not json.loads((run / "preflight.json").read_text())["errors"]
