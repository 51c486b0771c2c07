"""make quickstart ends with the report and with commands that a user can type."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess

import pytest

from tests.conftest import ROOT
from tests.toys.commands import make_run
from trainer.config.options import parse


@pytest.fixture
def ending(tmp_path):
    """What make prints around the run, for which a program that does nothing stands."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    (tmp_path / "venv" / ".installed").touch()
    words = ["make", "-s", "-C", str(ROOT), "quickstart", f"VENV={tmp_path / 'venv'}"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def test_it_names_the_report_and_commands_that_exist(ending, tmp_path, monkeypatch):
    name = re.search(r"^name: (\S+)", (ROOT / "conf/experiment/quickstart.yaml").read_text(), re.M)
    folder = f"runs/{name.group(1)}"
    assert f"The report: {folder}/report.html" in ending
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / folder)
    lines = [shlex.split(line) for line in ending.splitlines() if line.startswith("  graft ")]
    assert [words[1] for words in lines] == ["generate", "serve", "compare"]
    for _, verb, *words in lines:
        command = importlib.import_module(f"trainer.{verb}")
        parse(command.Options, words, command.__doc__, f"graft {verb}")


def test_what_these_commands_need_is_installed():
    """`graft serve` has packages of its own: the command that make names must not ask for them."""
    done = subprocess.run(
        ["make", "-n", "-s", "-C", str(ROOT), "quickstart", "VENV=nowhere"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "-e '.[serve]'" in done.stdout
