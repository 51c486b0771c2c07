"""A path that does not exist is reported by every command before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.conftest import ROOT, composed, sums, write_rows
from tests.toys.commands import RECORD, exit_code, make_run
from trainer import __main__
from trainer.config import files, paths
from trainer.config.commands import NAMES
from trainer.storage import door, run_folder

RUN = "nowhere is no run folder: it has no run.yaml"
FILE = "there is no such file"
SMOKE = ["experiment=smoke", "task.path=ROWS"]
# A command line and its message. ROWS is a file that exists.
MISSING = {
    "train": (["experiment=smoke", "task.path=nowhere.jsonl"], FILE),
    "held-out rows": ([*SMOKE, "task.eval_path=nowhere.jsonl"], FILE),
    "a part": (
        ["base=tiny", "max_steps=2", "task=mixture", "task.parts={a: {path: nowhere.jsonl}}"],
        "task.parts.a: task.path='nowhere.jsonl': there is no such file",
    ),
    "a base": ([*SMOKE, "base=hf", "base.path=./nowhere"], "there is no such folder"),
    "a GGUF file": ([*SMOKE, "base=hf", "base.path=nowhere.gguf"], FILE),
    "a target": ([*SMOKE, "adapter=none", "drafter=mtp_shared", "target.run=nowhere"], RUN),
    "a draft head": ([*SMOKE, "drafter=mtp_shared", "target.draft=nowhere"], "no drafter's folder"),
    "a branch": (
        [*SMOKE, "branch=cooldown", "branch.run=nowhere", "branch.step=1", "branch.steps=2",
         "max_steps=3"],
        f"branch.run=nowhere: {RUN}",
    ),
    "resume": ([*SMOKE, "resume=nowhere"], "that folder holds no run"),
    "preflight": (["preflight", "experiment=smoke", "task.path=nowhere.jsonl"], FILE),
    "evaluate": (["evaluate", "run=nowhere"], RUN),
    "evaluate speculation": (["evaluate", "task=speculation", "run=nowhere"], RUN),
    "generate": (["generate", "run=nowhere@best", "prompt=x"], RUN),
    "speculate": (["speculate", "run=nowhere", "prompt=x"], RUN),
    "questions": (["speculate", "run=RUN", "prompts=nowhere.jsonl"], FILE),
    "a tree": (["speculate", "run=RUN", "prompt=x", "tree=static", "paths=nowhere.json"], FILE),
    "a small model": (
        ["generate", "run=RUN", "prompt=x", "drafter=small", "small=./nowhere"],
        "there is no such folder",
    ),
    "respond": (["respond", "run=nowhere", "prompts=ROWS", "out=out"], RUN),
    "prompts": (["respond", "base=tiny", "prompts=nowhere.jsonl", "out=out"], FILE),
    "draft": (["draft", "run=nowhere", "prompts=ROWS", "out=out"], RUN),
    "realign": (["realign", "draft=nowhere", "target.run=nowhere"], RUN),
    "a head": (["realign", "draft=nowhere", "target.run=RUN"], "no drafter's folder"),
    "cooldown": (["cooldown", "from=nowhere@10", "steps=3"], RUN),
    "family": (["cooldown", "family=nowhere"], RUN),
    "export": (["export", "run=nowhere", "to=peft"], RUN),
    "compare": (["compare", "nowhere"], RUN),
    "compress": (["compress", "run=nowhere", "method=dare"], RUN),
    "ensemble": (["ensemble", "runs=[past,nowhere]"], RUN),
    "merge": (["merge", "runs=[nowhere,past]", "to=out"], RUN),
    "select": (["select", "run=nowhere", "keep=0.5", "by=random", "to=o.jsonl"], RUN),
    "a pool": (
        ["select", "run=past", "keep=0.5", "by=random", "to=o.jsonl", "task.path=nowhere.jsonl"],
        FILE,
    ),
    "targets": (["select", "run=past", "keep=2", "to=o.jsonl", "target=nowhere.jsonl"], FILE),
    "serve": (["serve", "run=nowhere"], RUN),
    "serve several": (["serve", "runs=[past,nowhere]"], RUN),
    "serve a list": (["serve", "runs=past"], "expected several runs as [FOLDER,FOLDER]"),
    "sizes": (["sizes", "run=nowhere"], RUN),
    "density": (["density", "run=nowhere"], RUN),
    "push": (["push", "run=nowhere", "to=org/name"], RUN),
    "report": (["report", "run=nowhere"], RUN),
    "import": (["import", "nowhere.yml"], FILE),
    "shrink": (
        ["shrink", "base.path=./nowhere", "task.path=ROWS", "to=out", "method=wanda"],
        "there is no such folder",
    ),
    "study": (["study", "nowhere.yaml"], "there is no such file, or one of"),
    "a run as a base": ([*SMOKE, "base=hf", "base.path=./past"], "adapter.from=./past continues"),
    "experiments": (["preflight", *SMOKE, "--config-dir=nowhere"], "there is no such folder"),
    "a file as a run": (["report", "run=rows.jsonl"], "rows.jsonl is no run folder"),
    "a checkpoint's report": (["report", "run=past@2"], "reads no checkpoint: give past"),
    "a step": (["sizes", "run=past@7"], "has no checkpoint '7'; it has the steps 2"),
    "a name": (["sizes", "run=past@new"], "'new' names no checkpoint: give last, best, or one"),
    "a file in a file": (["export", "run=past", "to=peft", "out=rows.jsonl/x"], "is no folder"),
    "a folder as a file": (["doctor", "json=past"], "json=past: it is a folder, expected the name"),
    "a page": (["compare", "past", "out=past"], "out=past: it is a folder, expected the name"),
}  # fmt: skip
NO_RECORD = "half/run.yaml is not a run's record: name is missing"
UNSAVED = "it has the steps none. The run has not saved one yet, or had callbacks.checkpoints=null"
READERS = [
    "evaluate", "evaluate speculation", "generate", "speculate", "respond", "draft", "cooldown",
    "export", "compress", "ensemble", "merge", "select", "serve", "serve several", "sizes",
    "density",
]  # fmt: skip
for name in [*READERS, "report", "compare", "push", "family"]:
    words = [word.replace("nowhere@10", "nowhere") for word in MISSING[name][0]]
    MISSING[f"{name}: half"] = ([word.replace("nowhere", "half") for word in words], NO_RECORD)
    if name in READERS:
        unsaved = [word.replace("nowhere", "unsaved") for word in words]
        MISSING[f"{name}: unsaved"] = (unsaved, UNSAVED)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a file of rows, a run's folder, one without a checkpoint, and one
    whose record is not whole."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    write_rows(tmp_path / "rows.jsonl", sums(4))
    make_run(tmp_path / "past")
    for name, text in (("unsaved", RECORD), ("half", "id: a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.yaml").write_text(text)
    return tmp_path


def words_of(case):
    words, said = MISSING[case]
    return [word.replace("ROWS", "rows.jsonl").replace("RUN", "past") for word in words], said


@pytest.mark.long
@pytest.mark.parametrize("case", MISSING)
def test_what_is_missing_is_said_before_anything_heavy(folder, monkeypatch, capfd, case):
    words, said = words_of(case)
    before = sorted(folder.iterdir())
    for module in ("trainer.run", "trainer.session.failures", "trainer.assembly.quiet"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    monkeypatch.setattr(sys, "argv", ["graft", *words])
    assert exit_code(__main__.run_words, words) == 2
    assert said in capfd.readouterr().err
    kept = ("runs", "past", "unsaved", "half", "checkpoints")
    left = [path for path in folder.rglob("*") if path.name not in kept]
    assert [path for path in left if path.is_dir()] == []
    assert not before or sorted(p for p in folder.iterdir() if p.name != "runs") == before


@pytest.mark.long
def test_a_missing_file_of_rows_is_said_after_one_composition(folder, monkeypatch, capfd):
    """Hydra composes twice, once for its mode: a config that was refused is not composed again."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    whole, composed = ConfigLoaderImpl._load_configuration_impl, []
    monkeypatch.setattr(
        ConfigLoaderImpl,
        "_load_configuration_impl",
        lambda *arguments, **named: composed.append(1) or whole(*arguments, **named),
    )
    for case in ("train", "a base"):
        composed.clear()
        words, said = words_of(case)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # a start sets it
        monkeypatch.setattr(sys, "argv", ["graft", *words])
        assert exit_code(__main__.run_words, words) == 2
        assert said in capfd.readouterr().err
        assert len(composed) == 1
    (folder / "nowhere.jsonl").write_bytes((folder / "rows.jsonl").read_bytes())
    words = [*words_of("train")[0], "batch_size=0"]  # what was refused is not remembered for long
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["graft", *words])
    assert exit_code(__main__.run_words, words) == 2
    assert "batch_size is 0" in capfd.readouterr().err


def test_every_command_is_among_them():
    commands = {MISSING[case][0][0] for case in MISSING}
    assert commands >= {*NAMES} - {"completion", "doctor", "schema", "submit"}


@pytest.mark.parametrize("case", ["train", "export: unsaved"])
def test_it_takes_no_torch(folder, case):
    """In a process of its own: `run` is not needed to see that nothing imports it."""
    words, said = words_of(case)
    code = (
        "import sys; from trainer import __main__\n"
        "try: sys.exit(__main__.run_words(sys.argv[1:]))\n"
        "finally: print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "False False\n")
    assert said in done.stderr


def test_a_job_is_queued_with_a_warning(folder, monkeypatch, capsys):
    """The nodes may have a disk that this machine has not."""
    from trainer import submit
    from trainer.cluster import batch_file

    monkeypatch.setattr(batch_file, "submit", lambda *_: ("7", "script"))
    words = ["experiment=smoke", "task.path=nowhere.jsonl", "lightning=cpu"]
    assert submit.main(words) == 0
    actual = capsys.readouterr()
    assert "warning: on this machine task.path='nowhere.jsonl': there is no such file" in actual.err
    assert actual.out.startswith("job 7")


def test_a_misspelt_run_is_suggested(folder):
    (folder / "runs" / "quickstart").mkdir(parents=True)
    (folder / "runs" / "quickstart" / "run.yaml").write_text(RECORD)
    assert paths.run_fault("runs/quikstart@best") == (
        "runs/quikstart is no run folder: it has no run.yaml. Did you mean runs/quickstart?"
    )
    assert paths.run_fault("runs/quickstart@best") is None


def test_a_place_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    assert files.place_fault(tmp_path / "a" / "b") is None
    assert files.output_fault(tmp_path / "a") is None
    assert files.output_fault(Path("/dev/null")) is None
    monkeypatch.setattr(files.os, "access", lambda place, mode: False)
    expected = f"the folder {tmp_path} cannot be written"
    assert files.place_fault(tmp_path / "a" / "b") == expected
    assert files.output_fault(tmp_path / "a") == expected
    assert files.output_fault(Path("/dev/null")) == "it cannot be written"
    with pytest.raises(run_folder.FolderError, match=r"cannot be written\. Choose another place"):
        door.refuse_existing(tmp_path / "a", "out=FOLDER")


def test_a_cache_that_cannot_be_written_is_a_problem(tmp_path, monkeypatch):
    assert paths.cache_fault() is None
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "taken" / "cache"))
    config = {"task": {}, "base": {}, "target": {}}
    (message,) = paths.problems(config)
    assert "taken/cache cannot be used" in message
    assert "GRAFT_CACHE=FOLDER" in message
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "new"))
    assert list(paths.problems(config)) == []
    assert (tmp_path / "new").is_dir()


@pytest.mark.long
def test_what_may_be_on_the_hub_is_not_missing(folder):
    for words in (
        ["task.path=org/name"],
        ["task.path=rows.jsonl", "base=hf", "base.path=org/name"],
        ["task=gsm8k"],
        ["task=bfcl"],
        ["task.path=[rows.jsonl,rows.jsonl]"],
    ):
        cfg = composed("base=tiny", "max_steps=2", *words)
        bare = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
        assert list(paths.problems(OmegaConf.to_container(bare, resolve=True))) == []


def test_a_start_that_failed_leaves_no_folder(tmp_path):
    for name in ("alone", "with a log", "begun"):
        folder = tmp_path / name
        (folder / "checkpoints").mkdir(parents=True)
        for file in run_folder.STARTED if name == "begun" else ("trainer.log",):
            (folder / file).write_text("x")
        run_folder.remove_unused(folder)
        assert not folder.exists()
    run_folder.remove_unused(tmp_path / "none")


@pytest.mark.parametrize(
    "file", ["run.yaml", "notes.txt", "metrics.jsonl", "checkpoints/step-00000001.ckpt"]
)
def test_a_folder_with_anything_in_it_stays_as_it_is(tmp_path, file):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / file).write_text("x")
    (tmp_path / "trainer.log").write_text("x")
    run_folder.remove_unused(tmp_path)
    assert (tmp_path / file).read_text() == (tmp_path / "trainer.log").read_text() == "x"


def test_a_folder_that_another_run_has_just_begun_stays(tmp_path):
    with run_folder.RunFolder.create(tmp_path / "run") as other:
        run_folder.remove_unused(other.path)
        assert other.checkpoints.is_dir()
