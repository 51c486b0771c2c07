"""The command from its start to Ctrl-C, and what it refuses before a model is loaded."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import tomllib

import openai
import pytest

from tests.conftest import ROOT
from tests.toys.commands import exit_code
from tests.toys.serving import RUNS
from trainer import serve


def test_it_answers_until_ctrl_c():
    command = [sys.executable, "-m", "trainer.serve", f"run={RUNS / 'lora'}", "port=0"]
    process = subprocess.Popen(
        [*command, "drafter=lookup"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=RUNS.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        lines = [process.stdout.readline() for _ in range(3)]
        assert lines[:2] == ["    base: the base alone, drafted\n", "    lora: step 5, drafted\n"]
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)/v1 the API", lines[2])[1])
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0)
        stream = client.completions.create(
            model="lora", prompt="abc", max_tokens=400, temperature=1, stream=True
        )
        assert next(iter(stream)).choices
        process.send_signal(signal.SIGINT)  # in the middle of an answer
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert [line for line in err.splitlines() if "older version" not in line] == []


def test_a_package_that_is_missing_is_reported_first(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name)
    )
    monkeypatch.setitem(sys.modules, "trainer.assembly.quiet", None)  # importing it fails
    assert serve.main([f"run={RUNS / 'lora'}"]) == 2
    assert capsys.readouterr().err == (
        f"graft serve needs uvicorn, which is not installed here. Fix: {serve.INSTALL}\n"
    )


def test_the_fix_installs_the_extra():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    expected = extra["optional-dependencies"]["serve"]
    assert f"pip install {' '.join(repr(each) for each in expected)}" == serve.INSTALL
    assert {re.match(r"\w+", each)[0] for each in expected} == {*serve.PACKAGES}


def test_a_port_in_use_is_reported_before_a_model_is_loaded(monkeypatch, capsys):
    from trainer.serving import models

    monkeypatch.setattr(models.Loader, "start", lambda *_: pytest.fail("it was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve.main([f"run={RUNS / 'lora'}", f"port={port}"]) == 2
    assert capsys.readouterr().err == (
        f"host=127.0.0.1 port={port}: another program uses it. Choose another port=, or port=0 for"
        " any that is free\n"
    )
    assert serve.main([f"run={RUNS / 'lora'}", "host=nowhere.invalid"]) == 2
    assert capsys.readouterr().err.startswith("host=nowhere.invalid: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either run=FOLDER or runs=[FOLDER,FOLDER]"),
        ([f"run={RUNS / 'lora'}", f"runs=[{RUNS / 'lora'}]"], "give either run=FOLDER or runs="),
        ([f"run={RUNS / 'lora'}", "port=70000"], "port=70000: expected a whole number"),
        ([f"run={RUNS / 'lora'}", "drafter=small"], "drafter=small and small=PATH"),
        ([f"run={RUNS / 'lora'}", "drafter=run+lookup"], "has no drafter. Train one"),
    ],
)
def test_what_is_refused(words, message, capsys):
    assert exit_code(serve.main, words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "key", "said"),
    [
        ("127.0.0.1", None, False),
        ("localhost", None, False),
        ("::1", None, False),
        ("0.0.0.0", None, "anyone on its network"),
        ("192.168.0.7", "secret", "anyone with the key on its network"),
    ],
)
def test_an_address_of_the_network_is_warned_of(host, key, said, capsys):
    serve._announce(host, 80, key)
    out = capsys.readouterr().out
    assert ("warning" in out) is bool(said)
    assert not said or said in out
    assert "secret" not in out
    assert f"http://{'[::1]' if host == '::1' else host}:80/v1" in out


@pytest.mark.parametrize(("host", "loads"), [("127.0.0.1", True), ("0.0.0.0", False)])
def test_only_a_loopback_address_loads_further_runs(host, loads, monkeypatch):
    from trainer.serving import listening, models

    made = []
    monkeypatch.setattr(models.Loader, "start", lambda *_: {})
    monkeypatch.setattr(listening, "make_server", lambda *words: made.append(words[-1]))
    monkeypatch.setattr(listening, "serve", lambda _, opened: opened.close())
    assert serve.main([f"run={RUNS / 'lora'}", f"host={host}", "port=0"]) == 0
    assert isinstance(made[0], models.Loader) is loads
