"""Disks that are full and places that cannot be written end in a message that fits the command, and
leave nothing behind."""

from __future__ import annotations

import errno
import os
import shutil
import sys

import pytest

from tests.conftest import ROOT, composed
from tests.toys.disks import full_disk
from trainer import report
from trainer.config.errors import ConfigError, unwritable
from trainer.config.options import exit_with
from trainer.session import failures, report_html
from trainer.storage import atomic

OLD = ROOT / "tests" / "data" / "runs_0.1" / "runs" / "lora"


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_full_disk_during_a_report(tmp_path, monkeypatch, capsys):
    run = shutil.copytree(OLD, tmp_path / "run")
    before = names(run)
    monkeypatch.setattr(report_html, "_plots", lambda rows: [])
    monkeypatch.setattr(atomic.os, "fsync", full_disk)
    assert report.main([f"run={run}"]) == 1
    message = capsys.readouterr().err
    assert "the disk is full" in message
    assert "Free some space, and run the command again" in message
    assert names(run) == before


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_full_disk_leaves_no_rest(tmp_path, monkeypatch, kind):
    """As during an export or a compression, whose libraries have errors of their own."""

    def fill(temporary):
        (temporary / "half" if kind == "folder" else temporary).write_text("half")
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    with pytest.raises(RuntimeError), getattr(atomic, kind)(tmp_path / "out") as temporary:
        fill(temporary)
    assert names(tmp_path) == []


def test_the_advice_fits_the_command():
    full = OSError(errno.ENOSPC, "No space left on device", "/x/y")
    assert failures.explained(full, {"seed": 0})[0].endswith("resume with resume=auto")
    assert failures.explained(full, {}, command=True)[0].endswith("run the command again")
    closed = OSError(errno.EACCES, "Permission denied", "/x/y")
    assert failures.explained(closed, {"seed": 0})[1] == 1  # amid a run
    assert failures.explained(closed, {"seed": 0}, command=True)[1] == 2
    library = RuntimeError("I/O error: No space left on device (os error 28)")
    assert failures.explained(library, {})[1] == 1
    assert unwritable(RuntimeError("another")) is None
    assert unwritable(OSError(errno.EAGAIN, "x", "/x")) is None


def test_what_a_command_writes_after_its_work(monkeypatch, capsys):
    def main(argv):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/x/result.json")

    monkeypatch.setattr(sys, "argv", ["graft"])
    with pytest.raises(SystemExit) as end:
        exit_with(main)
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert "/x/result.json cannot be read or written: Read-only file system" in message
    assert "Traceback" not in message


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    from trainer import preflight

    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "taken" / "cache"))
    (tmp_path / "rows.jsonl").write_text("{}\n")
    words = ["experiment=smoke", f"task.path={tmp_path / 'rows.jsonl'}", "max_steps=1"]
    assert preflight.main(words) == 2
    message = capsys.readouterr().err
    assert f"the cache {tmp_path / 'taken' / 'cache'} cannot be used" in message
    assert "GRAFT_CACHE=FOLDER" in message


@pytest.mark.parametrize(
    "words", [["task.path="], ["task.path=[]"], ["task.path=[a.jsonl,'']"], ["task.path=' '"]]
)
def test_an_empty_path_is_refused_before_anything_is_fetched(words):
    with pytest.raises(ConfigError, match=r"task.path=.*expected a file, a folder or a name"):
        composed("experiment=smoke", *words)
