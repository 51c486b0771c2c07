"""The adapter of docs/developer/add-a-method.md passes the laws, and no other file changes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

from tests.docs.pages import ROOT, text

PAGE = "docs/developer/add-a-method.md"


def files():
    """The blocks of the page that have a file's name for a title."""
    return re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```$', text(PAGE), re.MULTILINE | re.DOTALL)


def test_it_is_one_file_and_one_config():
    assert [name for name, _ in files()] == ["adapters/rank_one.py", "conf/adapter/rank_one.yaml"]
    assert not any((ROOT / name).exists() for name, _ in files())


def test_the_page_s_adapter_passes_the_laws(tmp_path):
    for folder in ("adapters", "conf", "tasks", "tests", "trainer"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, content in files():
        (tmp_path / name).write_text(content, "utf-8")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/adapters/test_laws.py",
        "-k",
        "rank_one",
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"[1-9]\d* passed", done.stdout), done.stdout[-300:]
