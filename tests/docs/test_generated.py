"""The generated pages match help texts and conf/. After a change: python -m scripts.docs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from scripts import chat_templates, docs

CHANGED = "run python -m scripts.docs and commit the result"


@pytest.mark.long
def test_the_settings_are_those_of_conf():
    assert (docs.DOCS / "knobs.md").read_text("utf-8") == docs.knobs(), CHANGED


def test_the_commands_are_those_of_the_help_texts():
    command = [sys.executable, "-m", "scripts.docs", "check=true"]
    done = subprocess.run(command, cwd=docs.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
def test_a_setting_has_key_default_type_and_meaning():
    page = docs.knobs()
    assert "- `adapter.rank` = `16` (`int >= 1`): r, the inner dimension of B A\n" in page
    assert "- adapter=spiel keeps an age for each entry" in page
    assert (
        "All settings of [adapter=lora](#adapterlora), and with other values or further ones:\n"
        in page
    )


@pytest.mark.long
def test_the_table_of_templates_is_that_of_the_rows():
    text = chat_templates.PAGE.read_text("utf-8")
    assert text == chat_templates.page(), "run python -m scripts.chat_templates"
