"""Every command that takes a folder refuses a stranger's before it reads or writes there."""

from __future__ import annotations

import importlib
import os
import shutil

import pytest

from tests.conftest import ROOT, composed, sums, write_rows
from trainer.config.commands import NAMES
from trainer.config.errors import ConfigError

OLD = ROOT / "tests" / "data" / "runs_0.1" / "runs" / "lora"
# The arguments of each command that takes a run folder, once for each way to name one.
TAKES = {
    "compare": [["{run}"], ["family={run}"]],
    "compress": [["run={run}", "method=dare"]],
    "cooldown": [["from={run}", "steps=2"], ["family={run}"]],
    "density": [["run={run}"]],
    "ensemble": [["runs=[{run},{run}@last]"]],
    "evaluate": [["run={run}"], ["task=speculation", "run={run}"]],
    "draft": [["run={run}", "prompts=rows.jsonl", "out=out"]],
    "export": [["run={run}", "to=peft"], ["run={run}", "to=drafter"]],
    "generate": [["run={run}", "prompt=x"]],
    "merge": [["runs=[{run},{run}@last]", "to=out"]],
    "push": [["run={run}", "to=org/name"]],
    "realign": [["draft={run}", "target.run={run}"]],
    "report": [["run={run}"]],
    "respond": [["run={run}", "prompts=rows.jsonl", "out=out"]],
    "select": [["run={run}", "keep=0.5", "by=random", "to=out.jsonl"]],
    "serve": [["run={run}"], ["runs=[{run}]"]],
    "sizes": [["run={run}"]],
    "speculate": [["run={run}", "prompt=x"]],
}
# They take a config; test_a_config_that_names_a_strangers_folder has its folders.
NOTHING = {"completion", "doctor", "import", "schema"}  # they read no folder
CONFIGS = {"preflight", "shrink", "study", "submit"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder that is whole, in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", sums(4))
    return shutil.copytree(OLD, tmp_path / "run")


def a_link_out(run):
    (run / "report.html.tmp").symlink_to(run.parent / "victim")


def a_fifo(run):
    os.mkfifo(run / "checkpoints" / "x")


def a_record_of_aliases(run):
    lines = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (run / "run.yaml").write_text("\n".join(["a0: &a0 [x]", *lines]))


HOSTILE = {
    a_link_out: "is a link that leads out of the run folder",
    a_fifo: "is a device, a FIFO or a socket",
    a_record_of_aliases: "more than 400,000 values",
}


def files(folder):
    """The names and contents of a folder's files."""
    return {
        path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))
    }


def test_every_command_is_in_the_list():
    assert {*TAKES, *CONFIGS, *NOTHING} == set(NAMES)


@pytest.mark.long
@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda function: function.__name__)
@pytest.mark.parametrize(
    ("command", "words"),
    [(command, words) for command, ways in TAKES.items() for words in ways],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_command_refuses_it(run, capsys, command, words, hostile):
    hostile(run)
    before = files(run.parent)
    main = importlib.import_module(f"trainer.{command}").main
    try:
        code = main([word.format(run=run) for word in words])
    except SystemExit as end:  # of an option that is read first
        code = end.code
    said = capsys.readouterr().err
    assert code == 2, said
    assert HOSTILE[hostile] in said or command == "realign"  # which looks for a drafter first
    left = {path: content for path, content in files(run.parent).items() if path.name != ".lock"}
    left.pop(run.parent / "out", None)  # respond's own
    assert left == before


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda function: function.__name__)
def test_a_resume_refuses_it_before_the_log_is_opened(run, hostile):
    if hostile is a_record_of_aliases:
        return  # it is read by the run
    hostile(run)
    with pytest.raises(ConfigError, match=HOSTILE[hostile]):
        composed("experiment=smoke", "task.path=rows.jsonl", f"resume={run}")


@pytest.mark.long
@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda function: function.__name__)
def test_a_config_that_names_a_strangers_folder(run, capsys, hostile):
    from trainer import preflight

    hostile(run)
    words = ["experiment=smoke", "task.path=rows.jsonl", f"target.run={run}", "drafter=medusa"]
    assert preflight.main([*words, "objective=distill", "adapter=none"]) == 2
    said = " ".join("".join(capsys.readouterr()).split())  # a table's lines are broken
    assert HOSTILE[hostile] in said, said
