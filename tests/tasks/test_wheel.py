"""Wheels: fetched once and whole, or not at all, and what is said when that fails."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tasks import wheel
from tests.conftest import ROOT

NAME = "some_data-1.0-py3-none-any.whl"
WHOLE = b"the whole wheel"
HALF = WHOLE[:7]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(empty_cache: Path) -> Path:
    """Where the wheel belongs."""
    return empty_cache / "wheels" / "some-data-1.0"


def pip(folder: Path, body: str) -> Path:
    """A program that is started as pip is: `body` is to fill $WHEEL; each call is noted."""
    program = folder / "python"
    calls = folder / "calls"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> "{calls}"\nwhile [ "$1" != --dest ]; do shift;'
        f' done\nDEST="$2"\nWHEEL="$DEST/{NAME}"\n{body}\n'
    )
    program.chmod(0o755)
    return program


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


WRITES = f"printf '{WHOLE.decode()}' > \"$WHEEL\""
BREAKS_OFF = f"printf '{HALF.decode()}' > \"$WHEEL\"\necho 'ERROR: Connection broken' >&2\nexit 1"
HANGS = f"printf '{HALF.decode()}' > \"$WHEEL\"\nexec sleep 60"


def test_exactly_the_version_is_asked_for_without_its_dependencies(tmp_path, monkeypatch, folder):
    monkeypatch.setattr(sys, "executable", str(pip(tmp_path, WRITES)))
    assert wheel.fetch("some-data", "1.0") == folder / NAME
    assert (folder / NAME).read_bytes() == WHOLE
    (requested,) = (call.split() for call in calls(tmp_path))
    assert requested[:3] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} <= set(requested)
    assert requested[-1] == "some-data==1.0"


def test_a_fetched_wheel_is_not_fetched_again_until_it_is_forgotten(tmp_path, monkeypatch, folder):
    monkeypatch.setattr(sys, "executable", str(pip(tmp_path, WRITES)))
    for _ in range(3):
        assert wheel.fetch("some-data", "1.0").read_bytes() == WHOLE
    assert len(calls(tmp_path)) == 1
    wheel.forget("some-data", "1.0")
    assert not folder.exists()
    wheel.fetch("some-data", "1.0")
    assert len(calls(tmp_path)) == 2


def test_another_version_is_another_wheel(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(pip(tmp_path, WRITES)))
    first, second = wheel.fetch("some-data", "1.0"), wheel.fetch("some-data", "2.0")
    assert first.parent != second.parent
    wheel.forget("some-data", "1.0")
    assert (first.exists(), second.exists()) == (False, True)


def test_what_was_never_fetched_can_be_forgotten(empty_cache):
    wheel.forget("some-data", "1.0")
    assert not empty_cache.exists()


@pytest.mark.long
def test_two_fetches_at_once_ask_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(pip(tmp_path, f"sleep 0.3\n{WRITES}")))
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(lambda _: wheel.fetch("some-data", "1.0").read_bytes(), range(4)))
    assert actual == [WHOLE] * 4
    assert len(calls(tmp_path)) == 1


# what does not arrive


def test_a_download_that_breaks_off_leaves_nothing_and_the_next_one_is_whole(
    tmp_path, monkeypatch, folder
):
    monkeypatch.setattr(sys, "executable", str(pip(tmp_path, BREAKS_OFF)))
    with pytest.raises(
        wheel.FetchError, match=r"some-data 1\.0 could not be fetched.*: ERROR: Connection broken"
    ):
        wheel.fetch("some-data", "1.0")
    assert not list(folder.parent.rglob("*.whl"))
    monkeypatch.setattr(sys, "executable", str(pip(tmp_path, WRITES)))
    assert wheel.fetch("some-data", "1.0").read_bytes() == WHOLE


def test_the_half_of_a_killed_download_is_not_taken(tmp_path, monkeypatch, folder):
    code = (
        f"import sys; sys.executable = {str(pip(tmp_path, HANGS))!r}; from tasks import wheel;"
        " wheel.fetch('some-data', '1.0')"
    )
    killed = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    try:
        until = time.monotonic() + 15
        while not [half for half in folder.parent.rglob(NAME) if half.read_bytes() == HALF]:
            assert killed.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
    finally:
        os.killpg(killed.pid, 9)
        killed.wait()
    monkeypatch.setattr(sys, "executable", str(pip(tmp_path, WRITES)))
    assert wheel.fetch("some-data", "1.0").read_bytes() == WHOLE


def test_a_download_without_a_wheel_is_an_error(tmp_path, monkeypatch, folder):
    monkeypatch.setattr(sys, "executable", str(pip(tmp_path, "exit 0")))
    with pytest.raises(wheel.FetchError, match="pip wrote no wheel"):
        wheel.fetch("some-data", "1.0")
    assert not folder.exists()


def test_offline_the_message_names_the_reason_and_the_folder_and_a_wheel_put_there_is_taken(
    tmp_path, monkeypatch, folder
):
    offline = (
        "echo 'WARNING: Retrying' >&2\necho 'ERROR: No matching distribution found' >&2\nexit 1"
    )
    monkeypatch.setattr(sys, "executable", str(pip(tmp_path, offline)))
    with pytest.raises(wheel.FetchError) as caught:
        wheel.fetch("some-data", "1.0")
    first, second = str(caught.value).splitlines()
    assert first.endswith(": ERROR: No matching distribution found")
    assert second.endswith(f"pip download --no-deps some-data==1.0  and put the .whl into {folder}")
    folder.mkdir()
    (folder / NAME).write_bytes(WHOLE)
    assert wheel.fetch("some-data", "1.0") == folder / NAME
    assert len(calls(tmp_path)) == 1


# places and digests


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"GRAFT_CACHE": "mine", "XDG_CACHE_HOME": "xdg"}, "mine"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/graft"),
        ({"GRAFT_CACHE": "", "XDG_CACHE_HOME": ""}, "home/.cache/graft"),
        ({}, "home/.cache/graft"),
    ],
)
def test_the_cache_is_where_the_variables_say(monkeypatch, variables, expected):
    for name in ("GRAFT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "home"} | variables).items():
        monkeypatch.setenv(name, value)
    assert wheel.cache_dir() == Path(expected)


@pytest.mark.parametrize("size", [0, 1, 3_000_000])
def test_the_digest_is_of_the_whole_content(tmp_path, size):
    content = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    (tmp_path / "file").write_bytes(content)
    assert wheel.sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    (tmp_path / "file").write_bytes(content + b"\0")
    assert wheel.sha256(tmp_path / "file") != hashlib.sha256(content).hexdigest()
