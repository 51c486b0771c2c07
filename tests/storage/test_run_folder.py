"""The run folder: held by one process, its record read back as it was written, and what changed
between two starts named."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys

import pytest
import yaml

from tests.conftest import ROOT
from tests.toys.disks import full_disk
from trainer.storage import atomic, run_folder
from trainer.storage.run_folder import FolderError, RunFolder, differences

IDENTITY = {"choices": {"base": "tiny"}, "base": "abc", "steps": 3}
PLAIN = {
    "name": "größe",
    "seed": 0,
    "base": {"path": "a/ü\u2028b", "layers": 2},
    "tags": ["on", "1", "null"],
}
HOLDER = """
import sys
from pathlib import Path
from trainer.storage.run_folder import RunFolder
with RunFolder.create(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def elsewhere(tmp_path):
    """Another process that holds tmp_path/run; its standard input ends it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_folder_is_held_by_one_process_until_it_ends_however_it_ends(elsewhere, tmp_path):
    with pytest.raises(
        FolderError, match=r"run is in use by another process. Wait for it, or choose another name="
    ):
        RunFolder.create(tmp_path / "run")
    RunFolder.create(tmp_path / "other").__exit__()
    elsewhere.kill()
    elsewhere.wait()
    with RunFolder.create(tmp_path / "run") as again:
        assert again.checkpoints.is_dir()


def test_a_folder_is_free_again_after_an_error(tmp_path):
    place = RunFolder.create(tmp_path / "run")
    with pytest.raises(FolderError, match="in use"):
        RunFolder.create(tmp_path / "run")
    with pytest.raises(KeyError), place:
        raise KeyError
    RunFolder.create(tmp_path / "run").__exit__()


@pytest.mark.parametrize(
    ("built", "message"),
    [
        (lambda path: path.write_text(""), "Not a directory"),
        (lambda path: path.symlink_to("/proc"), "cannot be written"),
        (lambda path: (path / "run" / ".lock").mkdir(parents=True), "Is a directory"),
    ],
)
def test_a_place_that_cannot_be_written_names_another(tmp_path, built, message):
    built(tmp_path / "runs")
    with pytest.raises(
        FolderError, match=re.escape(f"{tmp_path / 'runs' / 'run'} cannot be written")
    ) as refusal:
        RunFolder.create(tmp_path / "runs" / "run")
    assert message in str(refusal.value)
    assert str(refusal.value).endswith("Choose another folder with runs=FOLDER")


def test_a_full_disk_leaves_the_earlier_record(tmp_path, monkeypatch):
    with RunFolder.create(tmp_path / "run") as place:
        first = place.record(PLAIN, [], IDENTITY, None)
        monkeypatch.setattr(atomic.os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left") as refusal:
            place.record(PLAIN | {"seed": 1}, [], IDENTITY, first)
        assert refusal.value.errno == errno.ENOSPC
        assert place.earlier() == first


def test_the_record_is_read_back_as_it_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/trainer/__main__.py", "task.path=a b", "seed=0"])
    with RunFolder.create(tmp_path / "run") as place:
        assert place.earlier() is None
        written = place.record(PLAIN, ["task.path=a b", "seed=0"], IDENTITY, None)
        assert place.earlier() == written
    assert written["config"] == PLAIN
    assert written["identity"] == IDENTITY
    assert written["overrides"] == ["task.path=a b", "seed=0"]
    assert "größe" in place.file.read_text("utf-8")  # for people to read
    (start,) = written["starts"]
    assert start["command"] == "trainer 'task.path=a b' seed=0"
    assert start["versions"].keys() == set(run_folder.PACKAGES)
    import torch

    assert start["versions"]["torch"] == torch.__version__


def test_a_run_that_goes_on_keeps_its_id_and_lists_its_starts(tmp_path):
    with RunFolder.create(tmp_path / "run") as place:
        first = place.record(PLAIN, [], IDENTITY, None)
        second = place.record(PLAIN | {"seed": 1}, ["seed=1"], IDENTITY, place.earlier())
        another = RunFolder(tmp_path / "another")
        another.path.mkdir()
        assert another.record(PLAIN, [], IDENTITY, None)["id"] != first["id"]
    assert second["id"] == first["id"]
    assert len(second["starts"]) == 2
    assert second["starts"][0] == first["starts"][0]
    assert second["config"]["seed"] == 1


def test_the_git_revision_is_that_of_the_source(tmp_path):
    with RunFolder.create(tmp_path / "run") as place:
        start = place.record(PLAIN, [], IDENTITY, None)["starts"][0]
    actual = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert (start["git"] or "").removesuffix(" with changes") == actual.stdout.strip()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [\n", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"", "is not a run's record: it is null, expected a mapping"),
        (b"42\n", "is not a run's record"),
        (b"id: x\nname: y\n", "is not a run's record"),
        (b"!!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    ],
)
def test_a_broken_record_is_refused_by_name(tmp_path, content, message):
    with RunFolder.create(tmp_path / "run") as place:
        place.file.write_bytes(content)
        with pytest.raises(FolderError, match=re.escape(message)) as refusal:
            place.earlier()
    assert str(place.file) in str(refusal.value)


def test_a_record_that_is_a_folder_is_refused(tmp_path):
    with RunFolder.create(tmp_path / "run") as place:
        place.file.mkdir()
        with pytest.raises(FolderError, match="cannot be read"):
            place.earlier()


# what changed

THEN = {
    "seed": 0,
    "base": {"layers": 2, "path": "a"},
    "task": {"columns": {}, "path": ["x", "y"]},
    "logger": {"w": {"mode": "auto"}},
}


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ({}, []),
        ({"seed": 1}, ["seed: 0 in the run, 1 now"]),
        ({"base": {"layers": 2, "path": None}}, ['base.path: "a" in the run, null now']),
        ({"task": {"columns": {"a": "b"}, "path": ["x", "y"]}}, ["task.columns", "task.columns.a"]),
        (
            {"task": {"columns": {}, "path": ["y", "x"]}},
            ['task.path: ["x", "y"] in the run, ["y", "x"] now'],
        ),
        ({"logger": {}}, []),
        ({"logger": {"w": {"mode": "online", "more": 1}}}, []),
        ({"loggers": 1}, ["loggers: null in the run, 1 now"]),  # only whole names are passed over
        (
            {"seed": 1, "base": {"layers": 3, "path": "a"}},
            ["base.layers: 2 in the run, 3 now", "seed: 0 in the run, 1 now"],
        ),
    ],
)
def test_differences_are_named_by_their_place(change, lines):
    actual = differences(THEN, THEN | change, ("logger",))
    assert len(actual) == len(lines)
    assert all(line.startswith(start) for line, start in zip(actual, lines, strict=True))


def test_a_key_that_is_gone_is_a_difference():
    assert differences({"a": 1, "b": 2}, {"a": 1}, ()) == ["b: 2 in the run, null now"]


# FOLDER@WHICH


@pytest.fixture
def recorded(tmp_path, compose):
    """A folder with a run.yaml of a real config, at a name of one's choice."""
    from omegaconf import OmegaConf

    def built(name, **changes):
        cfg = compose("+experiment=smoke", "task.path=rows", f"runs={tmp_path}")
        choices = OmegaConf.to_container(cfg.hydra.runtime.choices)
        plain = OmegaConf.to_container(
            OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]), resolve=True
        )
        with RunFolder.create(tmp_path / name) as place:
            place.record(plain | changes, [], {"choices": choices}, None)
        return place.path

    return built


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "requested", "which"),
    [
        ("run", "run", "last"),
        ("run", "run@best", "best"),
        ("run", "run@12", "12"),
        ("run", "run@", "last"),
        ("run", "run/", "last"),
        ("me@home", "me@home", "last"),
        ("me@home", "me@home@best", "best"),
    ],
)
def test_a_folder_and_its_checkpoint(recorded, tmp_path, name, requested, which):
    place = recorded(name)
    path, content, chosen = run_folder.read(f"{tmp_path}/{requested}")
    assert (path, chosen) == (place, which)
    assert content == yaml.safe_load((place / "run.yaml").read_text("utf-8"))


def test_a_folder_alone_is_the_result_of_the_run(recorded):
    place = recorded("run", export="best")
    assert run_folder.read(str(place))[2] == "best"
    assert run_folder.read(f"{place}@last")[2] == "last"


def test_a_home_folder_may_be_written_short(recorded, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    place = recorded("run")
    assert run_folder.read("~/run@best")[0] == place


@pytest.mark.parametrize("requested", ["nowhere", "nowhere@best", "", "@best"])
def test_no_folder_is_said_to_be_none(tmp_path, monkeypatch, requested):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FolderError, match=r"is no run folder: it has no run\.yaml"):
        run_folder.read(requested)


@pytest.mark.long
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"new_knob": 1}, "new_knob"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": "x"}, "seed is 'x'"),
    ],
)
def test_a_record_of_another_version_says_what_does_not_fit(recorded, change, message):
    with pytest.raises(FolderError, match="does not fit this version of Graft") as refusal:
        run_folder.read(str(recorded("run", **change)))
    assert message in str(refusal.value)


def test_a_record_of_an_older_version_is_completed_and_that_is_said_once(recorded, caplog):
    place = recorded("run")
    content = yaml.safe_load((place / "run.yaml").read_text("utf-8"))
    older = yaml.safe_load((place / "run.yaml").read_text("utf-8"))
    for key in ("fused", "requeue", "penalty"):
        del older["config"][key]
    del older["config"]["adapter"]["rank"], older["identity"]["choices"]["penalty"]
    (place / "run.yaml").write_text(yaml.safe_dump(older))
    assert run_folder.read(str(place))[1] == run_folder.read(str(place))[1] == content
    (message,) = caplog.messages
    assert (
        message == f"{place / 'run.yaml'} was written by an older version and lacks requeue, fused,"
        " adapter.rank, penalty; using the defaults from conf/"
    )
    del older["config"]["task"]["path"]
    (place / "run.yaml").write_text(yaml.safe_dump(older))
    with pytest.raises(
        FolderError, match=r"does not fit this version of Graft:\ntask.path is missing"
    ):
        run_folder.read(str(place))


def test_a_run_folder_may_be_moved(recorded, tmp_path):
    place = recorded("run", resume=str(tmp_path / "gone"))
    assert run_folder.read(str(place.rename(tmp_path / "moved")))[0] == tmp_path / "moved"
