"""Control characters of data, configs and models are shown on a terminal, and never sent to it."""

from __future__ import annotations

import ast
import io
import json
import logging
import re
import subprocess
import sys

import pytest
import rich
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tests.conftest import ROOT, write_rows
from trainer.config import shown as module
from trainer.config.errors import bad
from trainer.config.shown import protect_console, say, shown, shown_json

EVIL = "\x1b]0;title\x07\x1b[2J\x9b31m\r\x08\x7f\u202e"
SENT = set("\x1b\x07\x9b\r\x08\x7f\u202e\x00")
SEEN = r"\x1b]0;title\x07\x1b[2J\x9b31m\x0d\x08\x7f\u202e"


def test_what_is_shown():
    assert shown(EVIL) == SEEN
    assert shown("a\tb\nc") == "a\tb\nc"
    assert shown("größe \U0001f999 e\u0301 \u200d") == "größe \U0001f999 e\u0301 \u200d"
    assert shown("\ud800").encode() == rb"\ud800"
    for code in (*range(32), *range(127, 160)):
        assert (shown(chr(code)) == chr(code)) is (chr(code) in "\t\n")


def test_printed_json_can_be_read_back():
    text = shown(shown_json(json.dumps({"a": EVIL + "é"}, ensure_ascii=False)))
    assert json.loads(text) == {"a": EVIL + "é"}
    assert not SENT & set(text)


def test_messages_and_prints_are_shown(capsys):
    say(EVIL, 1)
    assert bad(EVIL) == 2
    output = capsys.readouterr()
    assert output.out == f"{SEEN} 1\n"
    assert output.err == f"{SEEN}\n"


def test_logs_are_shown(caplog):
    from trainer.config.secrets import redact_logs

    redact_logs()
    try:
        raise ValueError(EVIL)
    except ValueError:
        logging.getLogger("trainer").exception("a column %s", EVIL)
    assert SEEN in caplog.text
    assert not SENT & set(caplog.text)


@pytest.fixture
def console(monkeypatch):
    """rich's own console, on a terminal with colours."""
    built = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=120)
    monkeypatch.setattr(rich, "_console", built)
    protect_console()
    protect_console()
    return built


def test_what_rich_prints_is_shown_and_its_colours_stay(console):
    table = Table("name", EVIL)
    table.add_row(EVIL, Text(EVIL))
    for part in (EVIL, Text(EVIL, style="red"), table):
        console.print(part)
    console.rule("a" + EVIL)
    output = console.file.getvalue()
    assert "\x1b[31m" in output
    output = re.sub(r"\x1b\[[\d;]*m", "", output)  # rich's own colours
    assert not SENT & set(output), ascii(output)
    assert r"\x1b]0;title" in output


def test_the_preview_of_a_strangers_rows(console, tmp_path, monkeypatch, capsys):
    from trainer import preflight

    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{number} {EVIL}"},
                {"role": "assistant", "content": EVIL},
            ]
        }
        for number in range(9)
    ]
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", rows)
    words = ["experiment=smoke", "task.path=rows.jsonl", "max_steps=1", "task.on_bad=skip"]
    assert preflight.main(words) == 0, capsys.readouterr().err
    output = console.file.getvalue()
    assert r"\x1b]0;title" in output
    assert "\x1b]" not in output
    assert not SENT - {"\x1b"} & set(output)


def test_a_traceback_is_shown():
    program = (
        "from trainer.config.options import exit_with\n"
        f"def main(argv): raise LookupError({EVIL!r})\n"
        "exit_with(main)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"LookupError: {SEEN}" in done.stderr.replace(r"\\", "\\") or SEEN in done.stderr
    assert not SENT & set(done.stderr)


@pytest.mark.long
def test_nothing_is_printed_but_through_say():
    for package in ("trainer", "adapters", "tasks"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if path == ROOT / module.__file__ or path.name == "databases.py":
                continue
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
                assert called not in (
                    "print",
                    "rich.print",
                    "Console",
                    "sys.stdout.write",
                    "sys.stderr.write",
                ), (path, node.lineno)
