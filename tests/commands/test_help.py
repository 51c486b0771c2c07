"""Help and wrong arguments of every command answer before anything heavy is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from trainer.__main__ import run_words
from trainer.config import options
from trainer.config.commands import NAMES, no_such_command

WRONG = {name: ["zzz=1"] for name in NAMES} | {
    "study": ["zzz"],
    "submit": ["zzz"],
    "evaluate task=speculation": ["zzz=1"],
    "evaluate harness=TASKS": ["zzz=1"],
}
PROGRAM = """
import sys
from trainer.__main__ import run_words
try:
    code = run_words(sys.argv[1:])
except SystemExit as end:
    code = end.code
heavy = ("torch", "transformers", "numpy", "lightning", "pyarrow", "datasets")
print("CODE", code, [name for name in heavy if name in sys.modules])
"""


def ran(*words):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.parametrize("command", WRONG)
def test_help_and_a_wrong_argument_import_nothing_heavy(command):
    words = command.split()
    done = ran(*words, "--help")
    assert done.stdout.endswith("CODE 0 []\n"), done.stdout + done.stderr
    assert f"graft {command}" in done.stdout or f"graft {words[0]}" in done.stdout
    done = ran(*words, *WRONG[command])
    assert done.stdout == "CODE 2 []\n", done.stdout + done.stderr
    advice, *faults = done.stderr.splitlines()
    assert advice == f"graft {command} --help shows the options" or command == "preflight"
    assert any("zzz" in fault for fault in (faults or [advice]))  # last on the screen
    assert len(faults) <= 3


def test_the_list_of_commands_has_a_line_for_each():
    done = ran("--help")
    for name in NAMES:
        line = next(line for line in done.stdout.splitlines() if line.startswith(f"    {name} "))
        first = (ROOT / "trainer" / f"{name}.py").read_text("utf-8").split('"""')[1]
        assert line.split(maxsplit=1)[1] == first.splitlines()[0].strip()
        assert first.splitlines()[0].endswith(".")
        assert len(line) <= 100
    assert done.stdout.endswith("CODE 0 []\n")


def test_a_command_file_is_short():
    for name in NAMES:
        text = (ROOT / "trainer" / f"{name}.py").read_text("utf-8")
        lines = text.split('"""', 2)[2].splitlines()  # without the help text
        assert len(lines) <= 160, name
        assert max(map(len, lines)) <= 100, name


def test_a_closed_pipe_is_no_error(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for words in (["trainer", "--help"], ["trainer.export", "--help"], ["trainer", "sizes", "-h"]):
        read, write = os.pipe()
        os.close(read)  # nobody reads, as after `| head -0`
        done = subprocess.run(
            [sys.executable, "-m", *words],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            timeout=120,
        )
        os.close(write)
        assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("words", [["report", "run=no"], ["trainer.report", "run=no"]])
def test_a_command_is_the_same_by_both_names(words, tmp_path):
    module = ["trainer", *words] if words[0] == "report" else words
    done = subprocess.run(
        [sys.executable, "-m", *module],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
    )
    assert done.returncode == 2
    fault = "run=no: no is no run folder: it has no run.yaml"
    assert done.stderr == f"graft report --help shows the options\n{fault}\n"


def test_the_console_script_is_the_program():
    import tomllib

    scripts = tomllib.loads((Path(ROOT) / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"graft": "trainer.__main__:main"}


@pytest.mark.parametrize("command", NAMES)
def test_a_misspelt_command_is_suggested(command):
    swapped = command[:2] + command[3] + command[2] + command[4:]
    for word in (swapped, command[:-1], command + "s"):
        if word not in NAMES:
            assert no_such_command(word).endswith(f"Did you mean {command}?")


def test_a_word_like_no_command_lists_all_commands():
    assert no_such_command("zzz").endswith(f"Known: {', '.join(NAMES)}.")
    assert "graft experiment=NAME" in no_such_command("train")


def test_help_is_a_command_too(capsys):
    assert exit_code_of_words("help") == 0
    assert "graft COMMAND" in capsys.readouterr().out
    assert exit_code_of_words("help", "export") == 0
    assert "graft export" in capsys.readouterr().out


def test_a_misspelt_option_is_not_hidden_by_the_missing_ones(capsys):
    assert exit_code_of_words("export", "rnu=x") == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == "rnu=x: there is no such option. Did you mean run?"


def exit_code_of_words(*words):
    """The exit code of `graft WORDS`."""
    try:
        return run_words([*words])
    except SystemExit as end:
        return end.code


def test_ctrl_c_ends_a_command_without_a_traceback():
    def interrupted(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        options.exit_with(interrupted)
    assert end.value.code == 130
