"""W&B against a server that works, refuses, answers 500 or hangs: the run continues, and missing
data are uploaded later, once."""

from __future__ import annotations

import logging
import os
import re
import shlex
import subprocess
import sys
import time

import pytest
import yaml
from safetensors.torch import load_file

from tests.conftest import ROOT, sums, write_rows
from tests.wandb_stub import Stub
from trainer.callbacks.dashboards import Dashboards, numbers
from trainer.callbacks.tracking import wandb_logger
from trainer.cluster.slurm_job import Stopped
from trainer.models.losses import NonFinite
from trainer.storage.journal import Journal

KEY = "0123456789" * 4
SECRETS = {
    "WANDB_API_KEY": KEY,
    "SOME_PASSWORD": "correct-horse-battery",
    "HF_TOKEN": "hf_canaryCANARYcanaryCANARYcanary",
}
START = {
    "command": "trainer +experiment=x",
    "git": "0" * 8,
    "number": 1,
    "versions": {"torch": "2"},
}
ID = "abcd1234"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The stub, with a home folder and a key for it; afterwards nothing of W&B is left in this
    process."""
    import wandb

    for name, value in (SECRETS | {"HOME": str(tmp_path), "SLURM_JOB_ID": "42"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(
        sys,
        "argv",
        ["trainer", f"task.system=the password is {SECRETS['SOME_PASSWORD']}", "seed=0"],
    )
    with Stub() as stub:
        monkeypatch.setenv("WANDB_BASE_URL", stub.url)
        wandb.teardown()
        yield stub
        stub.become("refuse")
        wandb.teardown()


@pytest.fixture
def run(tmp_path, server):
    """A start of a run without a training: logs steps and samples, and ends; returns the seconds
    that its end took."""
    folder = tmp_path / "runs" / "a run"
    folder.mkdir(parents=True)

    def started(
        steps, mode="auto", error=None, meanwhile=lambda: None, artifacts=False, init_timeout=3.0
    ):
        with Dashboards() as dashboards:
            logger = wandb_logger(
                folder,
                ID,
                "a run",
                {"seed": 0, "optimizer": {"lr": 0.1}},
                START,
                None,
                "graft",
                None,
                mode,
                "g",
                "test",
                ["t"],
                "n",
                2,
                artifacts,
                True,
                None,
                init_timeout,
                2.0,
            )
            dashboards.all = [logger]
            journal = Journal(folder, dashboards.all)
            for step in steps:
                journal.tokens = 10 * step
                journal.write(
                    "step",
                    step,
                    {"loss": 1 / (step + 1), "lr": 0.1, "offset1/top1": 0.5, "tokens_per_s": 9.0},
                )
                if step == 1:
                    meanwhile()
            actual = {
                "where": "x:1",
                "prompt": "p",
                "expected": "e",
                "answer": "a",
                "scores": {"exact": 1.0},
            }
            journal.write_samples(0 if 0 in steps else steps[-1], [actual] * 3)
            journal.write("evaluation", steps[-1], {"loss": 0.5, "seconds": 1.0})
            began = time.monotonic()
            dashboards.__exit__(type(error), error, None)
        return time.monotonic() - began

    started.folder = folder
    return started


def uploaded(server, caplog):
    """Run the command that the log names, as a user would. Return its output."""
    reported = [
        actual[1]
        for record in caplog.records
        if (actual := re.search(r"Upload it with: (wandb sync .*)", record.getMessage()))
    ]
    words = shlex.split(reported[-1])
    assert set(reported) == {reported[-1]}
    command = [sys.executable, "-m", *words]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"WANDB_BASE_URL": server.url},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def steps_of(server):
    """global_step of every row with a loss, after a check that W&B's own step only grows."""
    history = server.history(ID)
    own = [row["_step"] for row in history]
    assert own == sorted(set(own))
    return [row["global_step"] for row in history if "train/loss" in row]


@pytest.mark.long
def test_a_run_that_goes_on_is_one_run_with_all_that_belongs_to_it(server, run, caplog):
    adapter = run.folder / "adapter"
    adapter.mkdir()
    (adapter / "weights").write_bytes(b"weights")
    (run.folder / "report.html").write_text("report")
    stopped = Stopped(15, run.folder, 2, 5)
    run(range(3), error=stopped)
    with caplog.at_level(logging.INFO):
        run(range(3, 5), artifacts=True)
    assert "wandb sync" not in caplog.text  # nothing is left to upload
    stored = server.runs[ID]
    assert list(server.runs) == [ID]
    assert (stored.display, stored.group, stored.job_type, stored.notes, stored.tags) == (
        "a run",
        "g",
        "test",
        "n",
        ["t"],
    )
    assert stored.exits == [128 + 15, 0]
    assert steps_of(server) == [0, 1, 2, 3, 4]
    assert (
        server.history(ID)[0].items()
        >= {
            "train/loss": 1,
            "train/lr": 0.1,
            "heads/offset1/top1": 0.5,
            "speed/tokens_per_s": 9,
            "global_step": 0,
            "tokens": 0,
        }.items()
    )
    assert stored.config["optimizer"]["value"] == {"lr": 0.1}
    start = stored.config["start"]["value"]
    assert (start["git"], start["slurm_job_id"], start["versions"]) == (
        "0" * 8,
        "42",
        {"torch": "2"},
    )
    assert [alert["title"] for alert in server.alerts] == [
        "a run has stopped",
        "a run has finished",
    ]
    assert "loss 0.5" in server.alerts[1]["text"]
    tables = [row for row in server.history(ID) for name in row if name.startswith("samples/")]
    assert [{"samples/before", "samples/after"} & row.keys() for row in tables] == [
        {"samples/before"},
        {"samples/after"},
    ]
    assert tables[0]["samples/before"]["nrows"] == 2
    (result,) = [artifact for artifact in server.artifacts if artifact["type"] == "adapter"]
    assert result["committed"]
    assert {
        name: content for name, content in result["files"].items() if name != "manifest.json"
    } == {
        "adapter/weights": b"weights",
        "report.html": b"report",
    }


@pytest.mark.long
def test_no_secret_is_in_a_byte_that_is_written_or_sent(server, run, tmp_path):
    run(range(2))
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert b"seed=0" in b"".join(
        path.read_bytes() for path in written if path.name == "wandb-metadata.json"
    )  # the command is there
    for secret in SECRETS.values():
        assert [path for path in written if secret.encode() in path.read_bytes()] == []
        assert not any(secret.encode() in body for body in server.received)


def test_what_a_server_missed_is_uploaded_once_by_one_command(server, run, caplog):
    with caplog.at_level(logging.INFO):
        run(range(3), meanwhile=lambda: server.become("refuse"))
        assert "not everything was uploaded" in caplog.text
        run(range(3, 5), init_timeout=1.0)
        run(range(5, 7), mode="offline")
    server.become("well")
    assert "Finished syncing" in uploaded(server, caplog)
    assert steps_of(server) == list(range(7))
    assert "No runs to sync" in uploaded(server, caplog)
    tables = [
        row[name]["path"]
        for row in server.history(ID)
        for name in row
        if name.startswith("samples/")
    ]
    assert len(tables) == 3
    assert set(tables) <= server.runs[ID].files.keys()


@pytest.mark.parametrize("mode", ["hang", "error"])
def test_a_server_that_hangs_or_fails_at_the_start_or_the_end_costs_seconds(
    server, run, caplog, mode
):
    (run.folder / "report.html").write_text("report")
    with caplog.at_level(logging.INFO):
        assert run(range(2), meanwhile=lambda: server.become(mode), artifacts=True) < 15
        began = time.monotonic()
        run(range(2, 4), init_timeout=1.0)
        assert time.monotonic() - began < 20
        assert "so this run is logged offline" in caplog.text
    server.become("well")
    uploaded(server, caplog)
    assert steps_of(server) == [0, 1, 2, 3]


@pytest.mark.long
def test_losses_that_are_not_finite_raise_an_alarm(server, run):
    run([0], error=NonFinite("3 steps in a row, up to step 9, had a loss that is not finite"))
    (alert,) = server.alerts
    assert (alert["title"], alert["severity"]) == ("a run: not finite", "ERROR")
    assert server.runs[ID].exits == [1]


@pytest.mark.parametrize(
    ("kind", "key", "name"),
    [
        ("step", "loss", "train/loss"),
        ("step", "seconds", "speed/seconds"),
        ("step", "offset2/top1", "heads/offset2/top1"),
        ("step", "density", "train/density"),
        ("density", "model.layers.0", "density/model.layers.0"),
        ("evaluation", "loss", "eval/loss"),
        ("evaluation", "offset2/top1", "heads_eval/offset2/top1"),
        ("evaluation", "accepted", "heads_eval/accepted"),
        ("average", "loss", "eval_average/loss"),
        ("average", "offset1/loss", "heads_average/offset1/loss"),
        ("adapter", "replaced", "mask/replaced"),
        ("penalty", "tau/model.layers.0", "density/tau/model.layers.0"),
        ("cooldown", "steps", "cooldown/steps"),
    ],
)
def test_numbers_are_grouped_by_what_they_are_of(kind, key, name):
    assert numbers(kind, {key: 1.0, "text": "a", "tokens": 9, "none": None}) == {name: 1.0}


@pytest.mark.long
def test_the_sweep_composes_with_every_value(compose):
    sweep = yaml.safe_load((ROOT / "scripts" / "wandb_sweep.yaml").read_text())
    assert sweep["command"][-1] == "${args_no_hyphens}"
    fixed = [word for word in sweep["command"] if "=" in word]
    assert sweep["metric"]["name"] in numbers("evaluation", {"loss": 1.0})
    for name, values in sweep["parameters"].items():
        for value in values.get("values") or [values["min"], values["max"]]:
            compose(*fixed, f"{name}={value}")


WATCHED = ["precision=fp32", "max_steps=4"]


@pytest.fixture(scope="module")
def alone(train_in, tmp_path_factory):
    """The run that no server watches."""
    folder = tmp_path_factory.mktemp("alone")
    chats = write_rows(folder / "chats.jsonl", sums(60))
    return train_in(folder, f"task.path={chats}", *WATCHED, "name=alone")


@pytest.mark.slow
@pytest.mark.timeout(400)  # some wait for minutes: tests.spreading lets their file begin early
@pytest.mark.parametrize("mode", ["well", "refuse", "error", "hang", "dies"])
def test_a_run_has_the_same_weights_and_exit_code_whatever_the_server_does(
    program, chats, tmp_path, alone, mode
):
    with Stub() as server:
        environment = {
            "WANDB_API_KEY": KEY,
            "WANDB_BASE_URL": server.url,
            "WANDB_MODE": "online",
            "HOME": str(tmp_path),
        }
        settings = ["+experiment=smoke", f"task.path={chats}", *WATCHED]
        wandb = [
            "logger=wandb",
            "logger.wandb.artifacts=true",
            "logger.wandb.init_timeout=2",
            "logger.wandb.finish_timeout=5",
        ]
        if mode == "dies":
            server.dies_after = 3
        elif mode != "well":
            server.become(mode)
        began = time.monotonic()
        both = program(*settings, *wandb, "name=watched", env=environment)
        assert both.returncode == 0, both.stdout + both.stderr
        assert time.monotonic() - began < 240  # 92 s on two quiet cores
        first, second = (
            load_file(run / "adapter" / "adapter_model.safetensors")
            for run in (alone, tmp_path / "runs" / "watched")
        )
        assert first.keys() == second.keys()
        assert all(first[name].equal(second[name]) for name in first)
        if mode != "well":
            server.dies_after = None
            server.become("well")
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "wandb",
                    "sync",
                    "--include-online",
                    str(tmp_path / "runs/watched/wandb"),
                ],
                env=os.environ | environment,
                check=True,
                timeout=120,
            )
        (actual,) = server.runs
        assert [row["global_step"] for row in server.history(actual) if "train/loss" in row] == [
            1,
            2,
            3,
            4,
        ]
