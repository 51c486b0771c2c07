"""One of four processes makes what all need. The others wait at its lock, also if one of them is
killed, and with lock files of a dead host."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import pytest

from tests.conftest import ROOT
from trainer.storage import locks

LIMIT = 60.0  # seconds
# Makes a file if there is none, as slowly as `go` appears, and logs each message to a file.
MAKER = """
import logging, pathlib, sys, time
from trainer.storage import locks
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
locks.WAIT = 0.1
logging.basicConfig(filename=folder / f"{name}.log", level=logging.INFO)
with locks.locked(folder / "made.lock", "the rows"):
    if not (folder / "made").exists():
        with (folder / "makers").open("a") as makers:
            makers.write(name + "\\n")
        while not (folder / "go").exists():
            time.sleep(0.02)
        (folder / "made").write_text("whole")
"""


def until(done: Callable[[], bool]) -> None:
    """Wait for a condition."""
    end = time.monotonic() + LIMIT
    while not done():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


@contextlib.contextmanager
def four(folder: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Start four makers, and wait until one makes and three wait. All are ended at the end."""
    started = {
        name: subprocess.Popen(
            [sys.executable, "-c", MAKER, str(folder), name],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        for name in "abcd"
    }
    try:
        until(lambda: sum(waits(folder, name) for name in started) == 3)
        yield started
    finally:
        for process in started.values():
            process.kill()
            process.wait()


def waits(folder: Path, name: str) -> bool:
    log = folder / f"{name}.log"
    return log.exists() and "the rows: another process has been making this" in log.read_text()


def makers(folder: Path) -> list[str]:
    return (folder / "makers").read_text().split()


def test_a_waiting_process_that_is_killed_stops_nobody(tmp_path):
    with four(tmp_path) as started:
        (maker,) = makers(tmp_path)
        killed = next(name for name in started if name != maker)
        started[killed].send_signal(signal.SIGKILL)
        (tmp_path / "go").touch()
        codes = {name: process.wait(LIMIT) for name, process in started.items()}
    assert codes == {name: -9 if name == killed else 0 for name in codes}
    assert makers(tmp_path) == [maker]


def test_when_the_maker_is_killed_another_one_makes_it(tmp_path):
    with four(tmp_path) as started:
        (killed,) = makers(tmp_path)
        started[killed].send_signal(signal.SIGKILL)
        until(lambda: len(makers(tmp_path)) == 2)
        (tmp_path / "go").touch()
        codes = {name: process.wait(LIMIT) for name, process in started.items()}
    assert codes == {name: -9 if name == killed else 0 for name in codes}
    assert len(set(makers(tmp_path))) == 2


def test_a_lock_file_of_a_dead_host_locks_nothing(tmp_path):
    (tmp_path / "rows.lock").write_text("4242\nnode17\n")
    with locks.locked(tmp_path / "rows.lock", "the rows") as waited:
        assert not waited


def test_without_flock_a_dead_process_of_this_host_holds_nothing(tmp_path, without_flock):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "rows.lock").write_text(f"{dead.pid}\n{os.uname().nodename}\n")
    long_ago = time.time() - 3600
    os.utime(tmp_path / "rows.lock", (long_ago, long_ago))
    with locks.locked(tmp_path / "rows.lock", "the rows"):
        pass


def test_without_flock_the_process_of_another_host_is_named(
    tmp_path, without_flock, monkeypatch, caplog
):
    """Nobody can know whether it lives: the message says which file to delete then."""
    file = tmp_path / "rows.lock"
    file.write_text("4242\nnode17\n")
    monkeypatch.setattr(locks, "WAIT", 0.1)

    class Deleting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            file.unlink(missing_ok=True)

    handler = Deleting()
    locks.log.addHandler(handler)
    try:
        with caplog.at_level(logging.INFO), locks.locked(file, "the rows") as waited:
            assert waited
    finally:
        locks.log.removeHandler(handler)
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.endswith(f"(process 4242 of 'node17'. If it has ended, delete {file})")


@pytest.fixture
def without_flock(monkeypatch):
    """A filesystem without flock, as filelock treats it."""
    monkeypatch.setattr(locks, "FileLock", filelock.SoftFileLock)
