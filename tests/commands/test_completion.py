"""graft completion: what the shells offer, and bash itself through a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tests.toys.commands import exit_code
from trainer import completion
from trainer.config import schema
from trainer.config.commands import NAMES


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("graft comp", ["compare", "completion", "compress", "compile="]),
        ("graft adapter=lor", ["adapter=lora", "adapter=loraplus"]),
        ("graft +experiment=smo", ["+experiment=smoke"]),
        ("graft adapter.ra", ["adapter.rank="]),
        ("graft adapter=rosa adapter.den", ["adapter.density=", "adapter.density_pattern="]),
        ("graft callbacks.evaluation.mo", [
            "callbacks.evaluation.monitor=", "callbacks.evaluation.mode=",
        ]),
        ("graft callbacks.evaluation.mode=", [
            "callbacks.evaluation.mode=min", "callbacks.evaluation.mode=max",
        ]),
        ("graft packing=", ["packing=true", "packing=false"]),
        ("graft overlong=", ["overlong=drop", "overlong=truncate", "overlong=raise"]),
        ("graft callb", ["callbacks=", "callbacks."]),
        ("graft export to=sp", ["to=speculators"]),
        ("graft export to=peft dt", ["dtype="]),
        ("graft export to=peft t", []),
        ("graft sizes spec", ["spectrum="]),
        ("graft sizes spectrum=", ["spectrum=true", "spectrum=false"]),
        ("graft preflight adapter=ros", ["adapter=rosa"]),
        ("graft help exp", ["export"]),
        ("graft optimizer.lr=", []),
        ("graft nothing.such.", []),
    ],
)  # fmt: skip
def test_what_can_follow(line, offered):
    words = completion.candidates(line)
    assert sorted(words) == sorted(offered)


def test_every_command_every_group_and_every_choice_is_offered():
    words = completion.candidates("graft ")
    assert set(words) >= {*NAMES, "help", "adapter=", "task."}
    for command in NAMES:
        completion.candidates(f"graft {command} ")
    for group in ("adapter", "drafter", "task"):
        offered = completion.candidates(f"graft {group}=")
        assert offered == [f"{group}={choice}" for choice in schema.options(group)]


def test_a_script_for_each_shell_and_bad_input(capsys):
    for shell, script in completion.SCRIPTS.items():
        assert exit_code(completion.main, [f"shell={shell}"]) == 0
        assert capsys.readouterr().out.strip() == script.strip()
        if program := shutil.which(shell):
            subprocess.run([program, "-n", "-c", script], check=True)
    assert exit_code(completion.main, []) == 2
    assert "give either shell=" in capsys.readouterr().err


def typed(master, text, until, seconds=60.0):
    """Type into a terminal, and return what it shows until a pattern appears."""
    os.write(master, text.encode())
    shown, end = "", time.monotonic() + seconds
    while time.monotonic() < end:
        if select.select([master], [], [], 0.2)[0]:
            shown += os.read(master, 4096).decode("utf-8", "replace")
            if re.search(until, shown):
                return shown
    raise AssertionError(f"{until} did not appear in {shown!r}")


def test_tab_in_bash(tmp_path):
    program = tmp_path / "graft"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m trainer "$@"\n')
    program.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "TERM": "dumb",
        "PS1": "$ ", "INPUTRC": "/dev/null",
    }  # fmt: skip
    master, slave = pty.openpty()
    shell = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"], stdin=slave, stdout=slave, stderr=slave,
        env=environment, start_new_session=True, cwd=tmp_path,
    )  # fmt: skip
    os.close(slave)
    try:
        typed(master, 'eval "$(graft completion shell=bash)"; echo rea""dy\n', "ready")
        typed(master, "graft experiment=smo\t", "experiment=smoke")
        typed(master, " adapter=ros\t", "adapter=rosa")
        typed(master, " adapter.restart\t", r"adapter\.restart_after_mask=")
        typed(master, "\x15graft exper\t", "experiment=")
        typed(master, "\x15graft export to=spec\t", "to=speculators")
    finally:
        shell.kill()
        shell.wait()
        os.close(master)
