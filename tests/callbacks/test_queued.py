"""MLflow, Comet and Trackio get each row in order, and a dead server costs a run nothing."""

from __future__ import annotations

import logging
import sys
import threading
import time
import types

import pytest

from trainer.callbacks import queued
from trainer.config.errors import ConfigError

VALUES = {"loss": 2.0, "global_step": 1, "name": "a"}


class Client:
    """Keeps the rows that are sent. It can fail or hang at a step."""

    def __init__(self, fails_at=None, hangs_at=None):
        self.rows, self.closed = [], []
        self.fails_at, self.hangs_at, self.release = fails_at, hangs_at, threading.Event()

    def log(self, values, step):
        if step == self.fails_at:
            raise ConnectionError("no route to the server\nand more")
        if step == self.hangs_at:
            self.release.wait(30)
        self.rows.append((values, step))

    def close(self, failed):
        self.closed.append(failed)


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "trainer.callbacks.queued")
    return lambda: [record.getMessage() for record in caplog.records]


def test_rows_arrive_in_order_and_the_end_waits_for_them(warnings):
    client = Client()
    board = queued.Queued("MLflow", lambda: client, 20)
    for step in range(50):
        board.log("step", step, 10 * step, VALUES | {"loss": float(step)})
    board.log("evaluation", 50, None, {"loss": 1.0})
    board.finish(None)
    assert client.rows[:2] == [
        ({"train/loss": 0.0, "tokens": 0.0}, 0),
        ({"train/loss": 1.0, "tokens": 10.0}, 1),
    ]
    assert [step for _, step in client.rows] == [*range(51)]
    assert client.rows[-1] == ({"eval/loss": 1.0}, 50)
    assert client.closed == [False]
    assert warnings() == []


def test_a_run_that_failed_is_a_failed_one_there():
    client = Client()
    board = queued.Queued("MLflow", lambda: client, 20)
    board.finish(RuntimeError("x"))
    assert client.closed == [True]


def test_a_failure_is_logged_once_and_the_run_goes_on(warnings):
    client = Client(fails_at=1)
    board = queued.Queued("MLflow", lambda: client, 20)
    for step in range(4):
        board.log("step", step, None, VALUES)
    board.thread.join(10)
    board.log("step", 4, None, VALUES)
    start = time.monotonic()
    board.finish(None)
    assert time.monotonic() - start < 5  # seconds, far less than the limit: nobody waits for it
    assert [step for _, step in client.rows] == [0]
    assert warnings() == ["MLflow: no route to the server. The run continues without it"]


def test_a_server_that_hangs_delays_no_step_and_the_end_by_its_limit(warnings, monkeypatch):
    monkeypatch.setattr(queued, "WAITING", 3)
    client = Client(hangs_at=0)
    board = queued.Queued("Comet", lambda: client, 0.2)
    board.log("step", 0, None, VALUES)
    while board.rows.qsize():  # the thread takes it
        time.sleep(0.01)
    board.log("step", 1, None, VALUES)
    board.finish(None)
    assert warnings() == [
        "Comet: 2 rows were not sent within 0.2 seconds. The run continues without it"
    ]
    client.release.set()


def test_a_full_queue_gives_up(warnings, monkeypatch):
    monkeypatch.setattr(queued, "WAITING", 3)
    client = Client(hangs_at=0)
    board = queued.Queued("Comet", lambda: client, 0.2)
    for step in range(9):
        board.log("step", step, None, VALUES)
    assert warnings() == ["Comet: 3 rows wait for the server. The run continues without it"]
    client.release.set()
    board.finish(None)


def test_a_client_that_ends_the_process_does_not(warnings):
    def connect():
        raise SystemExit("login first")

    board = queued.Queued("Trackio", connect, 20)
    board.thread.join(10)
    board.finish(None)
    assert warnings() == ["Trackio: login first. The run continues without it"]


ARGUMENTS = {
    "mlflow": {"tracking_uri": None, "experiment": "graft"},
    "comet": {"workspace": None, "project": "graft", "online": False},
    "trackio": {"project": "graft", "space_id": None},
}


def start(choice):
    make = getattr(queued, f"{choice}_logger")
    return make(None, "abc", "mine", {"seed": 1}, {}, finish_timeout=20, **ARGUMENTS[choice])


@pytest.mark.parametrize("choice", ARGUMENTS)
def test_a_package_that_is_missing_is_named(choice, monkeypatch):
    _, package, _ = next(each for each in queued.PACKAGES.values() if each[2] == choice)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"logger={choice} needs .*: pip install {package}$"):
        start(choice)


def test_trackio_gets_the_runs_name_and_numbers(monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((values, step)), finish=lambda: calls.append("end")
    )
    module = types.ModuleType("trackio")
    module.init = lambda **arguments: calls.append(arguments) or run
    monkeypatch.setitem(sys.modules, "trackio", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: module)
    board = start("trackio")
    board.log("step", 3, 7, VALUES)
    board.finish(None)
    assert calls[0]["name"] == "mine-abc"
    assert calls[0]["config"] == {"seed": 1}
    assert calls[0]["resume"] == "allow"
    assert calls[1:] == [({"train/loss": 2.0, "tokens": 7.0}, 3), "end"]


@pytest.mark.long
@pytest.mark.parametrize("choice", ARGUMENTS)
def test_a_config_chooses_it(compose, choice):
    cfg = compose("experiment=smoke", "task.path=x", f"logger={choice}")
    assert cfg.logger[choice]._target_ == f"trainer.callbacks.queued.{choice}_logger"
    assert cfg.logger[choice].finish_timeout == 20
