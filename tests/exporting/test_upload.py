"""graft push: what arrives at a Hub on the loopback interface is the folder, without paths and
secrets of this machine, and nothing arrives unasked."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load, save_file

from tests.exporting.test_card import SECRET, folder_of
from tests.hub_stub import Hub
from tests.session.test_compared import make
from tests.toys.commands import exit_code
from trainer import push
from trainer.exporting import card

TO = ["to=team/mine"]


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with Hub() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        yield server


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with an adapter for a base in a folder of this machine."""
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "models" / "small"
    run = make(tmp_path / "runs" / "mine", {"base.path": str(base), "task.path": "rows.jsonl"})
    adapter = folder_of(run / "adapter", base_model_name_or_path=str(base))
    save_file({"a": torch.arange(6.0)}, adapter / "adapter_model.safetensors", {"format": "pt"})
    (adapter / "tokenizer.json").write_text('{"vocab": {"/root": 1, "/tmp/x": 2}}')
    (adapter / "optimizer.pt").write_text("stays")
    card.write(adapter, "adapter", run, 1e-6)
    return run


@pytest.mark.long
def test_it_shows_what_would_go_and_sends_nothing(run, hub, capsys):
    assert exit_code(push.main, [f"run={run}", *TO]) == 0
    shown = capsys.readouterr().out
    for words in ("adapter_model.safetensors", "README.md", "local paths taken out of base_model",
                  "optimizer.pt", "stays here", "team/mine, private if it is new"):  # fmt: skip
        assert words in shown
    assert not hub.requests


@pytest.mark.long
@pytest.mark.parametrize("private", [True, False])
def test_the_hub_has_the_files_and_no_path(run, hub, capsys, private, tmp_path):
    words = [f"run={run}", *TO, "base=org/small", "yes=true"]
    assert exit_code(push.main, words if private else [*words, "private=false"]) == 0
    assert f"{hub.url}/team/mine" in capsys.readouterr().out
    repo = hub.repos["team/mine"]
    assert repo["private"] is private
    files = repo["files"]
    assert set(files) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
        "generation_config.json", "loss.svg", "tokenizer.json",
    }  # fmt: skip
    assert torch.equal(load(files["adapter_model.safetensors"])["a"], torch.arange(6.0))
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/small"
    assert files["tokenizer.json"] == (run / "adapter" / "tokenizer.json").read_bytes()
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    text = files["README.md"].decode()
    assert ModelCard(text).data.base_model == "org/small"
    assert 'PeftModel.from_pretrained(base, "team/mine")' in text
    assert "path/to/base" not in text
    # the run's own folder is as it was
    own = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert own["base_model_name_or_path"] == str(tmp_path / "models" / "small")


@pytest.mark.long
def test_an_older_folder_gets_its_card(run, hub):
    (run / "adapter" / "README.md").unlink()
    assert exit_code(push.main, [f"run={run}", *TO, "yes=true"]) == 0
    assert "team/mine" in hub.repos["team/mine"]["files"]["README.md"].decode()


@pytest.mark.long
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("notes.md", f"my token is {SECRET}", "notes.md holds what looks like a secret"),
        ("notes.md", "see {tmp}/x", "notes.md names a folder of this machine"),
        ("adapter_config.json", "{", "adapter_config.json is damaged"),
        ("adapter_model.safetensors", "xx", "is no safetensors file"),
    ],
)
def test_what_must_not_leave_is_refused_by_name(run, hub, capsys, tmp_path, file, content, message):
    (run / "adapter" / file).write_text(content.replace("{tmp}", str(tmp_path)))
    assert exit_code(push.main, [f"run={run}", *TO, "yes=true"]) == 2
    assert message in capsys.readouterr().err
    assert not hub.requests


@pytest.mark.long
def test_a_secret_in_the_metadata_of_weights_is_refused(run, hub, capsys):
    file = run / "adapter" / "adapter_model.safetensors"
    save_file({"a": torch.zeros(1)}, file, {"note": SECRET})
    assert exit_code(push.main, [f"run={run}", *TO, "yes=true"]) == 2
    assert "secret in its metadata" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize(
    ("status", "message", "code"),
    [
        (401, "set HF_TOKEN", 2),
        (403, "set HF_TOKEN", 2),
        (400, "refuses team/mine", 2),
        (501, "refuses team/mine", 1),
    ],
)
def test_a_hub_that_refuses_is_one_line(run, hub, capsys, status, message, code):
    hub.status = status
    assert exit_code(push.main, [f"run={run}", *TO, "yes=true"]) == code
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert "x" * 34 not in shown


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["to=mine"], "to=mine: expected ORG/NAME"),
        (["to=a/b/c"], "to=a/b/c: "),
        ([*TO, "base=small"], "base=small: expected ORG/NAME"),
        ([*TO, "part=merged"], "has no merged/: it has adapter"),
        ([*TO, "part=../mine/adapter"], "expected the name of a folder"),
    ],
)
def test_bad_input(run, capsys, words, message):
    assert exit_code(push.main, [f"run={run}", *words]) == 2
    assert message in capsys.readouterr().err
