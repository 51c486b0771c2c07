"""Signals are noted while a step is at hand, end the process where there is none, and are given
back afterwards."""

from __future__ import annotations

import ast
import io
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.conftest import ROOT
from trainer.cluster import slurm_job
from trainer.cluster.signals import HANDLED, Signals


@pytest.fixture(autouse=True)
def handlers():
    """The handlers of before, and a check that they are back."""
    before = {number: signal.getsignal(number) for number in HANDLED}
    yield before
    after = {number: signal.getsignal(number) for number in HANDLED}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == before


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", HANDLED)
def test_a_signal_within_a_step_is_noted_and_said(capfd, number):
    with Signals() as signals:
        signals.deferred = True
        assert signals.received is None
        send(number)
        assert signals.received == number
    message = capfd.readouterr().err
    assert (
        f"{number.name}: the current step is finished, then the run is saved and stops" in message
    )
    assert ("press Ctrl-C again to stop at once" in message) == (number == signal.SIGINT)


def test_a_signal_while_a_line_is_written_is_not_logged(capfd):
    """A stream cannot be entered twice: logging would report an error of its own."""

    class Stream(io.StringIO):
        def write(self, text):
            if "a line" in text:
                send(signal.SIGTERM)
            return super().write(text)

        def flush(self):
            assert not self.inside
            self.inside = True
            super().flush()
            self.inside = False

        inside = False

    handler = logging.StreamHandler(Stream())
    logger = logging.getLogger("trainer.cluster")
    logger.addHandler(handler)
    try:
        with Signals() as signals:
            signals.deferred = True
            logger.warning("a line")
    finally:
        logger.removeHandler(handler)
    assert handler.stream.getvalue() == "a line\n"
    assert "SIGTERM: the current step" in capfd.readouterr().err


@pytest.mark.long
def test_no_handler_of_a_signal_logs():
    for path in sorted((ROOT / "trainer").rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        handlers = {
            ast.unparse(node.args[1]).rpartition(".")[2]
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "signal.signal"
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name in handlers:
                assert "log." not in ast.unparse(node), (path, node.name)
                assert "print(" not in ast.unparse(node), (path, node.name)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_without_a_step_a_signal_ends_the_process(number, code):
    with pytest.raises(SystemExit) as end, Signals() as signals:
        send(number)
    assert end.value.code == code
    assert signals.received == number


@pytest.mark.parametrize("first", HANDLED)
def test_a_ctrl_c_after_another_signal_ends_the_process_within_a_step(first):
    with Signals() as signals:
        signals.deferred = True
        send(first)
        assert signals.received == first
        with pytest.raises(SystemExit) as end:
            send(signal.SIGINT)
    assert end.value.code == 130


def test_a_scheduler_that_asks_twice_is_still_given_the_step():
    with Signals() as signals:
        signals.deferred = True
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert signals.received == signal.SIGTERM


def test_handlers_come_back_also_after_an_error(handlers):
    with pytest.raises(KeyError), Signals():
        raise KeyError
    assert {number: signal.getsignal(number) for number in HANDLED} == handlers


def test_ones_own_handlers_come_back():
    seen = []
    before = {
        number: signal.signal(number, lambda number, frame: seen.append(number))
        for number in HANDLED
    }
    try:
        with Signals() as signals:
            signals.deferred = True
            send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert (signals.received, seen) == (signal.SIGTERM, [signal.SIGTERM])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_signals_are_taken_back_from_who_took_them_in_between():
    taken = []
    with Signals() as signals:
        signals.deferred = True
        signal.signal(signal.SIGTERM, lambda number, frame: taken.append(number))
        signals.install()
        send(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
    assert taken == []


def test_in_another_thread_no_handler_is_touched(handlers):
    actual = []

    def inside():
        with Signals() as signals:
            actual.append(
                (signals.received, {number: signal.getsignal(number) for number in HANDLED})
            )

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert actual == [(None, handlers)]


def test_a_run_gives_the_signals_back(train, chats, handlers):
    train(f"task.path={chats}", "max_steps=1", "callbacks.evaluation=null")
    assert {number: signal.getsignal(number) for number in HANDLED} == handlers


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_the_base_loads_ends_the_run_at_once(
    train, chats, monkeypatch, number, code
):
    from trainer.models.base import Base

    monkeypatch.setattr(Base, "load", lambda *arguments, **named: send(number))
    with pytest.raises(slurm_job.Stopped, match="stopped before anything was trained") as end:
        train(f"task.path={chats}", "max_steps=1")
    assert (
        slurm_job.exit_code({"requeue": "auto"}, end.value.number, end.value.folder, end.value.step)
        == code
    )


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGUSR1, -signal.SIGUSR1)],
)
def test_a_signal_during_the_first_imports(number, code):
    """A shell reports -N as 128 + N. Python would print a traceback of what it was importing."""
    program = [sys.executable, "-m", "trainer", "experiment=smoke", "task.path=rows.jsonl"]
    child = subprocess.Popen(program, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    # the package is found, and the first of its modules that takes long is being imported
    while child.poll() is None and b"omegaconf" not in mapped(child.pid):
        time.sleep(0.002)
    child.send_signal(number)
    _, message = child.communicate(timeout=120)
    assert child.returncode == code
    assert b"Traceback" not in message


@pytest.mark.parametrize("module", ["trainer", "trainer.respond"])
def test_a_ctrl_c_during_the_very_first_import(tmp_path, module):
    """A module that the package imports first sends the signal itself, so that no time is lost."""
    (tmp_path / "logging.py").write_text("import os\nos.kill(os.getpid(), 2)\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", module], capture_output=True, text=True, env=environment, timeout=60
    )
    assert (done.returncode, done.stderr) == (130, "")
    # a program that only imports the package keeps Python's own handler
    # a shell starts its background jobs without Ctrl-C, and Python then installs no handler
    program = (
        "import sys, _signal; _signal.signal(2, _signal.default_int_handler);"
        " sys.path.insert(0, sys.argv[1]); import trainer; print(1)"
    )
    plain = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert "KeyboardInterrupt" in plain.stderr


def mapped(pid):
    """What a process has imported so far, as far as its libraries tell: yaml's comes first."""
    try:
        with open(f"/proc/{pid}/maps", "rb") as file:
            return b"omegaconf" if b"_yaml" in file.read() else b""
    except OSError:
        return b"omegaconf"
