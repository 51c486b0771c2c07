"""Tests of several processes that start again after a crash."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest
import torch

from tests.ranks import spawn


def _crash_once(rank: int, folder: Path) -> None:
    assert not (folder / "half").exists()
    (folder / "half").write_text("written before the crash")
    outside = folder.parent / "crashed"
    if not outside.exists():
        outside.touch()
        os.kill(os.getpid(), signal.SIGSEGV)


def _die(rank: int, folder: Path) -> None:
    with (folder.parent / "starts").open("a") as file:
        file.write(".")
    os.kill(os.getpid(), int((folder / "signal").read_text()))


def test_a_crash_starts_once_again_in_the_folder_as_it_was(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "before").write_text("here")
    with pytest.warns(UserWarning, match="SIGSEGV"):
        spawn(_crash_once, folder, processes=1)
    assert {path.name for path in folder.iterdir()} >= {"before", "half"}


@pytest.mark.parametrize(("cause", "starts"), [(signal.SIGSEGV, 2), (signal.SIGKILL, 1)])
def test_what_always_crashes_fails(cause, starts, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "signal").write_text(str(int(cause)))
    with (
        pytest.warns(UserWarning, match="SIGSEGV") if starts == 2 else contextlib.nullcontext(),
        pytest.raises(torch.multiprocessing.ProcessExitedException, match=cause.name),
    ):
        spawn(_die, folder, processes=1)
    assert (tmp_path / "starts").read_text() == "." * starts
