"""The adapter of a run as part of another one's target, from run folders of version 0.1.0."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from adapters.full import Nothing
from tasks.reading import DataError
from tests.toys import adapters as toys
from trainer.assembly import trained as trained_module
from trainer.assembly.rows import load_data
from trainer.assembly.trained import Tuned, load_recorded_target, load_trained, load_tuned
from trainer.config import paths
from trainer.models.base import BaseError
from trainer.session import branches
from trainer.storage import checkpoints, run_folder
from trainer.storage.checkpoints import CheckpointError
from trainer.storage.run_folder import FolderError

DATA = Path(__file__).resolve().parent.parent / "data" / "runs_0.1"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A copy of the folders, with the paths and the base that they record."""
    shutil.copytree(DATA, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "runs"


def test_a_target_is_recorded_by_run_step_and_digest(runs):
    tuned = load_tuned(f"{runs / 'lora'}@4")
    assert tuned.record == {
        "run": str(runs / "lora"),
        "id": tuned.content["id"],
        "step": 4,
        "sha256": tuned.record["sha256"],
    }
    assert len(tuned.record["sha256"]) == 64
    assert load_tuned(str(runs / "lora")).record["step"] == 5
    again = load_tuned(f"{runs / 'lora'}@4", tuned.record["sha256"])
    assert all(map(torch.equal, again.saved["tensors"].values(), tuned.saved["tensors"].values()))


def test_another_checkpoint_than_the_recorded_one_is_refused(runs):
    with pytest.raises(CheckpointError, match="it has changed since"):
        load_tuned(f"{runs / 'lora'}@4", "0" * 64)
    with pytest.raises(CheckpointError, match="has no checkpoint '3'"):
        load_tuned(f"{runs / 'lora'}@3")
    with pytest.raises(FolderError, match="is no run folder"):
        load_tuned(str(runs / "none"))


def test_a_target_that_was_moved_with_its_neighbour_is_found(runs, tmp_path):
    record = load_tuned(f"{runs / 'lora'}@4").record
    moved = tmp_path / "elsewhere"
    runs.rename(moved)
    assert load_recorded_target(record, moved / "eagle3").record["id"] == record["id"]
    with pytest.raises(FolderError, match="is no run folder"):
        load_recorded_target(record, tmp_path / "other" / "eagle3")


def test_a_model_is_loaded_without_its_rows(runs, tmp_path):
    (tmp_path / "rows.jsonl").unlink()
    loaded = load_trained(str(runs / "lora"))
    assert loaded.renderer.chat([{"role": "user", "content": "1+2="}])
    with pytest.raises(DataError, match=r"task\.path='rows\.jsonl': there is no such file"):
        list(loaded.task.examples("eval"))
    with pytest.raises(DataError, match="there is no such file"):
        load_data(loaded.config, loaded.base, loaded.task, train=False)


def test_a_base_that_is_gone_is_named_with_the_way_out(runs, monkeypatch):
    monkeypatch.setattr(paths, "base_fault", lambda path: "there is no such folder")
    with pytest.raises(BaseError, match="record its new place by resuming the run"):
        load_trained(str(runs / "lora"))


class Adds(Nothing):
    """An adapter that leaves the model, and remembers what it was given."""

    def attach(self, model, start):
        self.start = start
        return model

    def load_state(self, model, saved):
        self.loaded = saved


def test_an_attached_target_is_frozen_and_in_eval_mode():
    adapter, saved = Adds(), {"tensors": {}}
    identity = {"trains_base": False, "labels": None, "steps": 3}
    tuned = Tuned({}, {"identity": identity}, adapter, saved)
    model = tuned.attach(toys.llama(torch.float32).train())
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert (adapter.start.steps, adapter.start.saved, adapter.loaded) == (3, saved, saved)


def test_what_trained_the_base_is_cast_to_what_the_model_computes_in():
    saved = {"tensors": {"w": torch.ones(2, dtype=torch.float64)}}
    identity = {"trains_base": True, "labels": None, "steps": 3}
    adapter = Adds()
    trained_module._attached(toys.llama(torch.bfloat16), adapter, identity, saved)
    assert adapter.loaded["tensors"]["w"].dtype == torch.bfloat16
    assert saved["tensors"]["w"].dtype == torch.float64


def test_a_base_that_has_changed_is_refused_before_it_is_loaded(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(trained_module.Base, "load", lambda *_, **__: pytest.fail("was loaded"))
    monkeypatch.setattr(trained_module.Base, "fingerprint", "other")
    with pytest.raises(BaseError, match="its weights have changed"):
        load_trained(str(runs / "lora"))


def requests_of(monkeypatch, place, content, which):
    """Let a run be read as `content`, and return the checkpoints that are read, in a list."""
    requests: list[str] = []

    def chosen(folder, which):
        requests.append(which)
        raise checkpoints.NoSuchCheckpoint("none")

    monkeypatch.setattr(run_folder, "read", lambda path: (place, content, which))
    monkeypatch.setattr(checkpoints, "chosen", chosen)
    return requests


def test_a_run_that_continues_keeps_the_step_of_its_target(tmp_path, monkeypatch):
    requests = requests_of(monkeypatch, tmp_path, {"id": "one"}, "best")
    for recorded in (None, {"id": "one", "step": 4}, {"id": "other", "step": 4}):
        with pytest.raises(checkpoints.NoSuchCheckpoint):
            load_tuned("run", recorded=recorded)
    assert requests == ["best", "4", "best"]


def test_a_cooldown_continues_the_last_checkpoint_whichever_is_the_result(tmp_path, monkeypatch):
    requests = requests_of(
        monkeypatch, tmp_path, {"config": {"branch": None, "export": "best"}}, "best"
    )
    for source in ("run", "run@best", "run@4"):
        with pytest.raises(checkpoints.NoSuchCheckpoint):
            branches.arguments(branches.Branch(source, "0.2"), [])
    assert requests == ["last", "best", "4"]
