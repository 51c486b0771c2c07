"""Files and folders appear whole, no link is written through, and what a killed writer left is
removed by the next one."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adapters import io
from tests.conftest import ROOT
from trainer.config import files
from trainer.storage import atomic

KILLED = """
import os, signal, sys
from pathlib import Path
from trainer.storage import atomic
with getattr(atomic, sys.argv[1])(Path(sys.argv[2])) as temporary:
    if temporary.is_dir():
        (temporary / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path, kind):
    target = tmp_path / "out"
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, kind, target], env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert ended.returncode == -signal.SIGKILL
    (left,) = names(tmp_path)
    assert left.startswith(".out")
    # not of this writer: another target's, a user's own folder, and one that is being written
    with getattr(atomic, kind)(tmp_path / "out-2"):
        assert left in names(tmp_path)
    (tmp_path / ".out-mine").mkdir()
    (tmp_path / ".out.notes.tmp").write_text("mine")
    with getattr(atomic, kind)(target) as writing, getattr(atomic, kind)(target):
        assert left not in names(tmp_path)
        assert writing.exists()
    assert names(tmp_path) == [".out-mine", ".out.notes.tmp", "out", "out-2"]


def test_links_are_neither_written_through_nor_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("out", "out.tmp", ".out.tmp"):
        (tmp_path / name).symlink_to(victim)
    atomic.write_text(tmp_path / "out", "new")
    assert (tmp_path / "out").read_text() == "new"
    assert not (tmp_path / "out").is_symlink()
    for name in ("link", "dangling"):
        (tmp_path / name).symlink_to(victim if name == "link" else tmp_path / "created")
        for opened in (files.append, files.edit):
            with pytest.raises(OSError, match="nothing is written through one"):
                opened(tmp_path / name)
        with pytest.raises(FileExistsError):
            files.create(tmp_path / name)
    assert victim.read_text() == "mine"
    assert not (tmp_path / "created").exists()


def test_a_link_that_took_the_new_files_place_is_not_renamed(tmp_path):
    """A process that can write into the folder replaces the temporary file."""
    (tmp_path / "other").write_text("theirs")

    def attacked():
        with atomic.file(tmp_path / "a") as temporary:
            temporary.unlink()
            temporary.symlink_to(tmp_path / "other")

    with pytest.raises(OSError, match="symbolic links"):
        attacked()
    assert not (tmp_path / "a").is_symlink()
    assert (tmp_path / "other").read_text() == "theirs"


def test_a_users_device_is_written_to(tmp_path, capfd):
    atomic.write_output(tmp_path / "x.json", "x")
    assert (tmp_path / "x.json").read_text() == "x"
    before = os.stat("/dev/null")
    atomic.write_output(Path("/dev/null"), "x")
    assert os.stat("/dev/null").st_rdev == before.st_rdev


@pytest.mark.parametrize("opened", [files.append, files.edit])
def test_a_fifo_is_no_file_to_write(tmp_path, opened):
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(OSError, match="it is no regular file"):
        opened(tmp_path / "fifo")
    os.close(reader)


def test_reading_stops_at_the_limit(tmp_path):
    (tmp_path / "x").write_bytes(b"12345")
    assert files.read_bytes(tmp_path / "x", 5) == b"12345"
    with pytest.raises(files.Unreadable, match="has 5 bytes; at most 4 are read"):
        files.read_bytes(tmp_path / "x", 4)
    with pytest.raises(files.Unreadable, match="is a device, a FIFO or a socket"):
        files.read_bytes(Path("/dev/zero"), 4)
    with pytest.raises(IsADirectoryError):
        files.read_bytes(tmp_path, 4)


def test_without_locks_nothing_is_taken_for_a_leftover(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    with atomic.file(tmp_path / "out"), atomic.file(tmp_path / "out"):
        assert len(names(tmp_path)) == 2
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027])
def test_every_file_has_the_mode_that_the_umask_gives(tmp_path, umask):
    """safetensors and mkdtemp alone make files and folders that only their owner reads."""
    before = os.umask(umask)
    try:
        with atomic.file(tmp_path / "file") as temporary:
            save_file({"a": torch.zeros(2)}, temporary)
        with atomic.folder(tmp_path / "folder") as temporary:
            (temporary / "inner").mkdir(0o700)
            save_file({"a": torch.zeros(2)}, temporary / "inner" / "x")
            (temporary / "link").symlink_to("nowhere")
        io.save_tensors({"a": torch.zeros(2)}, tmp_path / "adapter", {})
    finally:
        os.umask(before)
    for name in ("file", "folder/inner/x", "adapter"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask, name
    for name in ("folder", "folder/inner"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o777 & ~umask, name
