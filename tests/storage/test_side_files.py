"""Files of a run folder that only help, damaged in every way: they stop neither a resume, nor an
export, nor a report, and are never deleted."""

from __future__ import annotations

import json
import logging
import os
import shutil

import pytest

from tests.conftest import ROOT
from tests.toys.commands import exit_code
from trainer import export, report
from trainer.session import report_html
from trainer.storage import checkpoints, door, journal
from trainer.storage.checkpoints import Checkpoint, CheckpointError
from trainer.storage.journal import Journal
from trainer.storage.run_folder import FolderError, RunFolder

OLD = ROOT / "tests" / "data" / "runs_0.1" / "runs" / "lora"
SIDE = (
    "metrics.jsonl",
    "samples.jsonl",
    "preflight.json",
    "checkpoints/best.json",
    "checkpoints/constant.json",
)
WRONG = {  # valid JSON of another shape
    "a list": "[1, 2]",
    "a number": "7",
    "text": '"x"',
    "null": "null",
    "an empty mapping": "{}",
    "a mapping of others": '{"a": [{}]}',
    "other types": '{"kind": 1, "step": "x", "data": 3, "warnings": {}}',
    "other types within": '{"kind": "step", "step": 1, "loss": {}, "data": {"train": [1]},'
    ' "where": [], "prompt": {}, "scores": [1]}',
    "a step that is no number": '{"kind": "stopped", "step": true, "reason": 5}',
    "a reason that is none": '{"kind": "stopped", "step": 1, "reason": 5}',
    "a cooldown without length": '{"kind": "cooldown", "step": 1}',
    "a huge number": '{"kind": "step", "step": 1, "loss": 1' + "0" * 400 + ', "data": {}}',
    "half a character": '{"kind": "evaluation", "step": 1, "\\ud800": 1.0,'
    ' "warnings": ["\\ud800"]}',
    "not finite": '{"kind": "step", "step": 1, "loss": NaN, "lr": Infinity, "seconds": 1e999}',
}
DAMAGES = {
    **{name: lambda content, text=text: text.encode() for name, text in WRONG.items()},
    "cut": lambda content: content[: len(content) * 2 // 3],
    "empty": lambda content: b"",
    "bytes": lambda content: bytes(range(256)) * 4,
    "deep": lambda content: b"[" * 100_000,
    "a line in the middle": lambda content: b"{half\n" + content,
    "many digits": lambda content: b'{"kind": "step", "step": ' + b"9" * 5000 + b"}",
}


@pytest.fixture
def run(tmp_path):
    """A copy of a run folder that has every side file."""
    folder = shutil.copytree(OLD, tmp_path / "runs" / "lora")
    step = checkpoints.complete(folder / "checkpoints")[-1].step
    (folder / "preflight.json").write_text(json.dumps({"data": {}, "warnings": []}))
    for name in checkpoints.MARKS:
        (folder / "checkpoints" / f"{name}.json").write_text(json.dumps({"step": step}))
    return folder


@pytest.fixture(autouse=True)
def without_plots(monkeypatch):
    """Half a second for each."""
    monkeypatch.setattr(report_html, "_plots", lambda rows: report_html._curves(rows) and [])


def damaged(folder, name, damage):
    file = folder / name
    content = DAMAGES[damage](file.read_bytes() if file.exists() else b"{}")
    file.write_bytes(content)
    return file, content


@pytest.mark.long
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", SIDE)
def test_a_report_is_written_without_them(run, name, damage, capsys):
    file, content = damaged(run, name, damage)
    assert report.main([f"run={run}"]) == 0
    assert file.read_bytes() == content  # a report changes none of them
    assert "<h1>" in (run / "report.html").read_text("utf-8")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", SIDE)
def test_what_a_resume_reads_of_them(run, name, damage):
    """All that a resume reads and writes before it trains."""
    file, content = damaged(run, name, damage)
    folder = run / "checkpoints"
    checkpoints.set_damaged_aside(folder)
    for mark in checkpoints.MARKS:
        checkpoints.marked(folder, mark)
    rows = Journal(run, [])
    assert all(isinstance(row["step"], int) for row in rows.rows("stopped"))
    rows.rewind(10_000)
    rows.write_csv()
    stored = [path for path in run.rglob("*") if path.is_file() and path.read_bytes() == content]
    whole = {path.read_bytes() for path in run.rglob("*") if path.is_file()}
    # nothing is lost: the file stays, or stays under another name, or lost its cut-off end alone
    cut_off = damage == "cut" and b"\n" not in content  # in its first line
    assert (
        stored or cut_off or any(part and content.startswith(part.rstrip(b"\n")) for part in whole)
    )
    for row in journal.read(file) if name.endswith("jsonl") else []:
        assert door.mismatch(row, {"step": int, "*": object}) is None


def test_a_damaged_journal_is_set_aside_once_and_its_whole_lines_are_kept(run, caplog):
    before = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text("half\n" + before)
    for _ in range(2):
        Journal(run, []).rewind(10_000)
    aside = run / "metrics.jsonl.damaged"
    assert aside.read_text() == "half\n" + before
    assert not (run / "metrics.jsonl.damaged-2").exists()
    assert (run / "metrics.jsonl").read_text() == "".join(
        f"{line}\n" for line in before.splitlines() if '"stopped"' not in line
    )
    assert "line 1 is no row of it; its whole lines are kept" in caplog.text


def test_the_best_checkpoint_is_not_guessed(run, caplog):
    folder = run / "checkpoints"
    (folder / "best.json").write_text("[]")
    with pytest.raises(CheckpointError, match="so it is not known which step is the best one"):
        checkpoints.chosen(folder, "best")
    assert export.main([f"run={run}@best", "to=peft"]) == 2
    with caplog.at_level(logging.WARNING):
        checkpoints.set_damaged_aside(folder)
    assert (folder / "best.json.damaged").read_text() == "[]"
    assert "best.json is damaged (it is a list, expected a mapping)" in caplog.text


@pytest.mark.parametrize("text", [*WRONG.values(), "", "{", "[" * 100_000])
def test_a_manifest_of_another_shape_makes_its_checkpoint_damaged(tmp_path, text):
    checkpoint = Checkpoint.at(tmp_path, 1)
    checkpoint.path.write_bytes(b"x")
    checkpoint.manifest.write_text(text)
    assert checkpoints.fault(checkpoint) == "its manifest cannot be read"
    assert checkpoint.sha256 is None
    with pytest.raises(CheckpointError, match="every checkpoint of this run is damaged"):
        checkpoints.newest(tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("place", ["id", "name", "overrides", "identity", "starts", "config"])
@pytest.mark.parametrize("value", ["[1]", "{a: 1}", "7", "null", "''", "[{a: [1]}]", "~"])
def test_a_record_of_another_shape_is_refused_by_every_reader(run, place, value, capsys):
    """run.yaml decorates nothing: without it, it is not known what the folder holds."""
    import yaml

    content = yaml.safe_load((run / "run.yaml").read_text())
    content[place] = yaml.safe_load(value)
    (run / "run.yaml").write_text(yaml.safe_dump(content))
    code, message = exit_code(report.main, [f"run={run}"]), capsys.readouterr().err
    assert code == 2 or value != "null"
    assert code == 0 or f"{run / 'run.yaml'} is not a run's record" in message
    if code == 0:  # what the place may hold
        assert RunFolder(run).earlier() is not None
    else:
        with pytest.raises(FolderError, match="is not a run's record"):
            report_html.record_of(run)


@pytest.mark.parametrize("kind", ["fifo", "device", "link to a device", "loop"])
@pytest.mark.parametrize("name", ["run.yaml", "metrics.jsonl", "preflight.json", "x/deep"])
def test_no_command_reads_what_has_no_end(run, kind, name, capsys):
    file = run / name
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "device":
        try:
            os.mknod(file, 0o20666, os.makedev(1, 5))  # /dev/zero
        except PermissionError:
            pytest.skip("making a device takes root")
    elif kind == "loop":
        file.symlink_to(file.name)
    else:
        file.symlink_to("/dev/zero")
    for verb, arguments in ((report, ()), (export, ("to=peft",))):
        try:
            code = verb.main([f"run={run}", *arguments])
        except SystemExit as end:  # of an option that is read first
            code = end.code
        assert code == 2
        assert str(file) in capsys.readouterr().err or name == "run.yaml"


def test_a_report_does_not_write_through_a_link(run, tmp_path):
    """The attack: a temporary file's name that leads to a key file, and a name of several lines."""
    import yaml

    home = tmp_path / "home"
    home.mkdir()
    keys = home / "authorized_keys"
    keys.write_text("mine\n")
    (run / "report.html.tmp").symlink_to(keys)
    content = yaml.safe_load((run / "run.yaml").read_text())
    content["name"] = "x\nssh-ed25519 AAAA attacker\n"
    (run / "run.yaml").write_text(yaml.safe_dump(content))
    assert report.main([f"run={run}"]) == 2  # a link that leads out
    (run / "report.html.tmp").unlink()
    (run / "report.html").unlink(missing_ok=True)
    (run / "report.html").symlink_to(run / "metrics.jsonl")  # within the folder
    before = (run / "metrics.jsonl").read_bytes()
    assert report.main([f"run={run}"]) == 0
    assert not (run / "report.html").is_symlink()
    assert (run / "metrics.jsonl").read_bytes() == before
    assert keys.read_text() == "mine\n"


@pytest.mark.parametrize("damage", ["other types", "bytes"])
def test_a_run_resumes_with_all_of_them_damaged(train, chats, damage):
    words = (f"task.path={chats}", "max_steps=3", "callbacks.checkpoints.every=1", "threads=1")
    whole = train(*words, "name=whole")
    run = train(*words, "name=killed")
    folder = run / "checkpoints"
    checkpoints.remove(Checkpoint.at(folder, 3))  # as if it was killed in its last step
    (run / "report.html").unlink()
    for name in (*SIDE, "requeues.jsonl", "job"):
        damaged(run, name, damage)
    assert train(*words, "name=killed", "resume=auto") == run
    assert (run / "report.html").exists()
    assert checkpoints.complete(folder)[-1].step == 3
    results = [
        (path / "adapter" / "adapter_model.safetensors").read_bytes() for path in (whole, run)
    ]
    assert results[0] == results[1]
    for name in ("metrics.jsonl", "samples.jsonl", "checkpoints/best.json"):
        assert (run / f"{name}.damaged").exists(), name
    assert [row["step"] for row in journal.read(run / "metrics.jsonl")][-1] == 3
