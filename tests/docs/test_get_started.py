"""docs/get-started.md, command by command, on the tiny base."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import warm
from tests.docs.pages import ROOT, blocks

PAGE = "docs/get-started.md"
INSTALLS = ("make quickstart", "source .venv/bin/activate", "pip install ")  # done before tests run
# `graft`, with the tiny base in place of the real one, and rows of the page in place of BFCL's.
GRAFT = """#!/usr/bin/env bash
words=()
for word in "$@"; do
    if [ "$word" = experiment=quickstart ]; then
        words+=(experiment=smoke name=quickstart task.path=chats.jsonl max_steps=6)
        words+=(callbacks.evaluation.generate=4)
    else
        words+=("$word")
    fi
done
case "$1" in
    preflight|*=*)
        words+=(base=tiny logger=none precision=fp32 threads=1 max_length=512)
        words+=(callbacks.evaluation.max_new_tokens=4)
        ;;
esac
exec {python} -S {warm} {socket} graft "${words[@]}"
"""


def commands():
    """The page's blocks of shell, without those that install."""
    return [block for block in blocks(PAGE, "bash") if not block.startswith(INSTALLS)]


def test_only_installing_is_left_out():
    skipped = [
        line
        for block in blocks(PAGE, "bash")
        if block.startswith(INSTALLS)
        for line in block.splitlines()
    ]
    assert all(line.startswith(INSTALLS) for line in skipped)
    assert len(commands()) >= 7


@pytest.fixture
def graft(tmp_path, warm_socket):
    """A folder with `graft`, whose commands start with everything imported."""
    tool = tmp_path / "bin" / "graft"
    tool.parent.mkdir()
    names = {"{python}": sys.executable, "{warm}": warm.__file__, "{socket}": warm_socket}
    text = GRAFT
    for name, value in names.items():
        text = text.replace(name, value)
    tool.write_text(text)
    tool.chmod(0o755)
    return tool.parent


@pytest.mark.timeout(900)
def test_every_command_works(graft, tmp_path):
    environment = os.environ | {
        "PATH": f"{graft}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "WANDB_MODE": "disabled",
    }
    rows = next(block for block in blocks(PAGE, "bash") if block.startswith("python"))
    printed = ""
    for block in [
        rows,
        *commands(),
    ]:  # the rows first, since they stand in for those of the quickstart
        done = subprocess.run(
            ["bash", "-ec", block],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        printed += done.stdout
    assert (tmp_path / "runs" / "quickstart" / "report.html").exists()
    assert (tmp_path / "adapter-peft" / "adapter_model.safetensors").exists()
    assert (tmp_path / "runs" / "mine" / "report.html").exists()
    assert not (tmp_path / "runs" / "mine-2").exists()  # resume=auto took the run that was there
    assert "perplexity" in printed
