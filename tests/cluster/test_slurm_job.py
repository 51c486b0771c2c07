"""What a SLURM job tells the run, and when it is asked back. A scontrol of the tests' own stands
in; tests/slurm has the real one."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.conftest import ROOT
from trainer import __main__
from trainer.cluster import slurm_job
from trainer.cluster.signals import HANDLED
from trainer.config import run_name

SETTINGS = {"requeue": "auto", "max_requeues": 5}
ONE = {"devices": 1, "num_nodes": 1}


@pytest.fixture(autouse=True)
def slurm(monkeypatch, tmp_path):
    """A job 77 with a scontrol that answers from a file and notes what it is asked."""
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name)
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "scontrol"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n[ "$1" = show ] && cat {tmp_path}/job && exit'
        f" 0\ncat {tmp_path}/refusal >&2 2>/dev/null && exit 1\nexit 0\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    (tmp_path / "job").write_text(
        "JobId=77 JobName=x JobState=RUNNING Requeue=1 Restarts=0 EndTime=2026-01-02T03:04:05\n"
    )
    before = {number: signal.getsignal(number) for number in HANDLED}
    yield tmp_path
    for number, handler in before.items():
        signal.signal(number, handler)


def requested(folder: Path) -> list[str]:
    file = folder / "asked"
    return (
        [line for line in file.read_text().splitlines() if line.startswith("requeue")]
        if file.exists()
        else []
    )


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
def test_a_stopped_job_is_asked_back(slurm, number):
    assert slurm_job.exit_code(SETTINGS, number, slurm, 4) == 75
    assert requested(slurm) == ["requeue 77"]
    row = json.loads((slurm / "requeues.jsonl").read_text())
    assert (row["job"], row["step"], row["restarts"]) == ("77", 4, 0)


def test_a_task_of_an_array_is_asked_back_by_its_own_name(slurm, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert slurm_job.exit_code(SETTINGS, signal.SIGUSR1, None, None) == 75
    assert requested(slurm) == ["requeue 70_3"]


def test_one_process_asks_for_all(slurm, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert slurm_job.exit_code(SETTINGS, signal.SIGUSR1, slurm, 4) == 1
    assert requested(slurm) == []


@pytest.mark.parametrize(("tasks", "code"), [("2", 1), ("1", -signal.SIGTERM)])
def test_who_is_ended_for_anothers_mistake_has_the_lower_code(monkeypatch, tasks, code):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", tasks)
    ended = (
        "import os, signal; from trainer.cluster import slurm_job; slurm_job.exit_1_on_sigterm();"
        " os.kill(os.getpid(), signal.SIGTERM)"
    )
    assert subprocess.run([sys.executable, "-c", ended], cwd=ROOT).returncode == code


@pytest.mark.parametrize(
    ("rank", "tasks", "code", "waits"),
    [("1", "2", 2, True), ("0", "2", 2, False), ("1", "2", 0, False), ("0", "1", 2, False)],
)
def test_the_others_leave_after_the_first(monkeypatch, rank, tasks, code, waits):
    monkeypatch.setenv("SLURM_PROCID", rank)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", tasks)
    slept = []
    monkeypatch.setattr(
        time, "sleep", lambda seconds: slept.append((seconds, signal.getsignal(signal.SIGTERM)))
    )
    slurm_job.wait_for_rank0(code)
    assert slept == ([(slurm_job.WAIT_FOR_RANK0_S, signal.SIG_IGN)] if waits else [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"requeue": False}, ""),
        ({"job": "JobState=COMPLETING Requeue=1"}, "its state is COMPLETING"),
        ({"job": "JobState=CANCELLED Requeue=1"}, "its state is CANCELLED"),
        ({"job": "JobState=RUNNING Requeue=0"}, "without --requeue"),
        ({"restarts": "5"}, "5 times already (max_requeues=5)"),
        ({"refusal": "slurm_requeue error: Job has not been found"}, "Job has not been found"),
    ],
)
def test_what_does_not_come_back_says_why(slurm, monkeypatch, caplog, changes, message):
    if "job" in changes:
        (slurm / "job").write_text(changes["job"])
    if "refusal" in changes:
        (slurm / "refusal").write_text(changes["refusal"])
    monkeypatch.setenv("SLURM_RESTART_COUNT", changes.get("restarts", "0"))
    settings = SETTINGS | {key: changes[key] for key in ("requeue",) if key in changes}
    assert slurm_job.exit_code(settings, signal.SIGTERM, slurm, 4) == 143
    assert requested(slurm) == (["requeue 77"] if "refusal" in changes else [])
    assert message in caplog.text


def test_true_asks_also_where_the_job_was_not_submitted_so(slurm):
    (slurm / "job").write_text("JobState=RUNNING Requeue=0")
    assert slurm_job.exit_code(SETTINGS | {"requeue": True}, signal.SIGTERM, slurm, 4) == 75


def test_ctrl_c_and_other_places_ask_nobody(slurm, monkeypatch):
    assert slurm_job.exit_code(SETTINGS, signal.SIGINT, slurm, 4) == 130
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert slurm_job.exit_code(SETTINGS, signal.SIGUSR1, slurm, 4) == 138
    monkeypatch.delenv("SLURM_JOB_ID")
    assert slurm_job.exit_code(SETTINGS, signal.SIGTERM, slurm, 4) == 143
    assert requested(slurm) == []


def test_starts_that_gain_nothing_end(slurm, caplog):
    assert [
        slurm_job.exit_code(SETTINGS, signal.SIGUSR1, slurm, step) for step in (2, 4, 4, 4)
    ] == [75] * 4
    assert slurm_job.exit_code(SETTINGS, signal.SIGUSR1, slurm, 4) == 138
    assert "have trained no step beyond 4" in caplog.text


@pytest.mark.parametrize(
    ("step", "steps", "message"),
    [
        (3, 9, "SIGTERM: saved after step 3 of 9. Resume with resume=x"),
        (3, None, "SIGTERM: saved after step 3. Resume with resume=x"),
        (
            None,
            None,
            "SIGTERM: stopped before anything was trained that could be saved. Resume with"
            " resume=x",
        ),
    ],
)
def test_a_stop_says_how_far_it_came(step, steps, message):
    assert str(slurm_job.Stopped(15, Path("x"), step, steps)) == message


@pytest.mark.parametrize(("epochs", "message"), [(1, "step 3 of 8"), (None, "step 3")])
def test_a_run_that_only_time_ends_has_no_number_of_steps(epochs, message):
    from trainer.data.batches import BatchOrder
    from trainer.session.session import Unfinished, report_end

    steps = BatchOrder(np.ones(64, int), np.ones(64, int), 0, 4, 2, epochs=epochs).steps(None, None)
    journal, module = SimpleNamespace(write_csv=lambda: None), SimpleNamespace(step=3)
    context = SimpleNamespace(
        journal=journal,
        signals=SimpleNamespace(received=15),
        folder=SimpleNamespace(path=Path("x")),
        stopped=None,
        steps=steps,
    )
    with pytest.raises(slurm_job.Stopped, match=f"saved after {message}. Resume"):
        report_end(context, module)
    context.signals.received = None
    with pytest.raises(Unfinished, match=f"the run ended after {message} without a reason"):
        report_end(context, module)


def test_a_signal_before_there_is_a_folder_asks_too(slurm, compose, monkeypatch, tmp_path, caplog):
    from hydra.core.hydra_config import HydraConfig

    (tmp_path / "rows.jsonl").write_text("{}\n")
    cfg = compose("+experiment=smoke", f"task.path={tmp_path / 'rows.jsonl'}", f"runs={tmp_path}")
    HydraConfig.instance().set_config(cfg)
    monkeypatch.setattr(
        "trainer.run.run", lambda cfg, signals: os.kill(os.getpid(), signal.SIGUSR1)
    )
    with caplog.at_level(logging.INFO), pytest.raises(SystemExit) as end:
        __main__._job(cfg)
    assert end.value.code == 75
    assert requested(slurm) == ["requeue 77"]
    # the queue's own would make another exit code
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_a_signal_after_the_end_makes_no_failure_of_it(slurm, compose, monkeypatch, tmp_path):
    from hydra.core.hydra_config import HydraConfig

    (tmp_path / "rows.jsonl").write_text("{}\n")
    cfg = compose("+experiment=smoke", f"task.path={tmp_path / 'rows.jsonl'}", f"runs={tmp_path}")
    HydraConfig.instance().set_config(cfg)
    monkeypatch.setattr("trainer.run.run", lambda cfg, signals: 0.5)
    assert __main__._job(cfg) == 0.5
    assert all(signal.getsignal(number) == signal.SIG_IGN for number in HANDLED)
    assert requested(slurm) == []


def test_the_end_of_the_job(slurm, monkeypatch):
    assert slurm_job.end_time() == time.mktime((2026, 1, 2, 3, 4, 5, 0, 0, -1))
    (slurm / "job").write_text("JobState=RUNNING EndTime=Unknown")
    assert slurm_job.end_time() is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1234")
    assert slurm_job.end_time() == 1234


def test_a_job_that_starts_again_finds_its_folder(slurm, monkeypatch):
    for name, number in (("r", "77"), ("r-2", "77"), ("other", "70")):
        (slurm / name).mkdir()
        (slurm / name / "run.yaml").write_text("x")
        (slurm / name / "job").write_text(number)
    find = run_name.run_folder
    assert find(str(slurm), "r", "never") == str(slurm / "r-3")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert find(str(slurm), "r", "never") == str(slurm / "r-2")
    assert find(str(slurm), "other", "never") == str(slurm / "other-2")


# tasks


@pytest.mark.parametrize(
    ("devices", "nodes", "tasks", "fits"),
    [
        (1, 1, None, True),
        (1, 1, 1, True),
        (2, 2, 4, True),
        ([0, 1], 1, 2, True),
        (2, 1, None, False),
        (1, 1, 2, False),
        (2, 1, 1, False),
        ("auto", 1, 4, True),
    ],
)
def test_processes_are_the_tasks(slurm, monkeypatch, devices, nodes, tasks, fits):
    if tasks is not None:
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", str(tasks))
    fault = slurm_job.task_mismatch({"devices": devices, "num_nodes": nodes})
    assert (fault is None) == fits
    assert fits or "--ntasks-per-node" in fault


def test_without_slurm_nothing_is_compared(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert slurm_job.task_mismatch({"devices": 2, "num_nodes": 1}) is None
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.delenv("SLURM_JOB_ID")
    assert slurm_job.task_mismatch({"devices": 2, "num_nodes": 1}) is None


def test_the_program_refuses_other_tasks_before_torch(slurm, program, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    ended = program("+experiment=smoke", "task.path=rows", f"runs={slurm}")
    assert ended.returncode == 2
    assert "srun has started 2. Start as many: --nodes=1 --ntasks-per-node=1" in ended.stderr


@pytest.mark.parametrize("requested", ["true", "false", "auto"])
def test_each_of_its_values_can_be_asked_for(compose, requested):
    assert compose("+experiment=smoke", "task.path=x", f"requeue={requested}").requeue == {
        "true": True,
        "false": False,
    }.get(requested, requested)
