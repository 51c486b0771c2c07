"""A head of the base, continued on the fine-tuned model: settings of the new run, and the three
numbers."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import sums, write_rows
from tests.toys.commands import exit_code
from trainer import realign
from trainer.assembly.build import instantiate
from trainer.drafters import DrafterError, io
from trainer.evaluation import realigned
from trainer.storage import checkpoints, journal

HEAD = (
    "adapter=none",
    "objective=distill",
    "drafter=eagle3",
    "drafter.offsets=2",
    "drafter.aux_layers=[0,1,2]",
    "drafter.coverage=0",
    "drafter.draft_vocab_size=64",
    "drafter.init=last_layer",
    "batch_size=4",
    "task.eval_fraction=0.2",
    "max_steps=4",
)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def rows(stored):
    return write_rows(stored / "chats.jsonl", sums(60))


@pytest.fixture
def started(train, stored, rows):
    """(a head of the base, a fine-tuning run), made once and never written to."""
    if not (stored / "tuned").exists():
        train(f"task.path={rows}", *HEAD, f"runs={stored}", "name=head", "optimizer.lr=3e-3")
        train(
            f"task.path={rows}", f"runs={stored}", "name=tuned", "max_steps=3", "optimizer.lr=0.1"
        )
    return stored / "head", stored / "tuned"


@pytest.fixture
def here(train, monkeypatch):
    """What the verb starts as processes, run in this one."""
    reported = []

    def run(command):
        reported.append(command[3:])
        train(*(word for word in command[3:]))
        return 0

    monkeypatch.setattr("trainer.session.branches.finished", run)
    return reported


def test_a_head_goes_on_where_it_was(started, here, tmp_path, capsys):
    head, tuned = started
    before = {
        file: file.read_bytes() for place in started for file in place.rglob("*") if file.is_file()
    }
    assert (
        realign.main(
            [
                f"draft={head}",
                f"target.run={tuned}",
                "max_steps=2",
                "logger=none",
                f"runs={tmp_path}",
            ]
        )
        == 0
    )
    run = tmp_path / "head-tuned"
    record = yaml.safe_load((run / "run.yaml").read_text())
    config, there = record["config"], yaml.safe_load((head / "run.yaml").read_text())["config"]
    for key in ("task", "drafter", "objective", "batch_size", "seed", "precision", "schedule"):
        assert config[key] == there[key], key
    assert config["optimizer"]["lr"] == there["optimizer"]["lr"] == 3e-3
    assert config["max_steps"] == 2
    assert config["export"] == "best"
    evaluation = config["callbacks"]["evaluation"]
    assert (evaluation["monitor"], evaluation["mode"], evaluation["batch_size"]) == (
        "expected",
        "max",
        16,
    )
    assert record["identity"]["target"]["run"] == str(tuned)

    actual = json.loads((run / "realign.json").read_text())
    assert [row["stage"] for row in actual] == list(realigned.STAGES)
    assert [row["target"].partition(" + ")[2] for row in actual] == ["", "tuned@3", "tuned@3"]
    first, last = (
        [row for row in journal.read(place / "metrics.jsonl") if row["kind"] == "evaluation"]
        for place in (head, run)
    )
    best = json.loads((run / "drafter" / "config.json").read_text())["target"]["step"]
    expected = [first[-1], last[0], next(row for row in last if row["step"] == best)]
    for row, logged in zip(actual, expected, strict=True):
        for key in ("accepted", "expected", "loss", "offset1/acceptance", "offset2/top1"):
            assert row[key] == pytest.approx(logged[key], abs=1e-5), (row["stage"], key)
    assert actual[0]["expected"] != pytest.approx(actual[1]["expected"], abs=1e-4)
    text = (run / "realign.md").read_text()
    assert text in capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0] == "| | target | accepted | expected | 1 | 2 |"
    names = ("accepted", "expected", "offset1/acceptance", "offset2/acceptance")
    assert lines[4].endswith("".join(f" {actual[2][name]:.3f} |" for name in names))
    # The weights and the draft vocabulary are the head's, and neither it nor the target was
    # touched.
    earlier, own = (load_file(place / "drafter" / "model.safetensors") for place in (head, run))
    assert torch.equal(earlier["d2t"], own["d2t"])
    assert torch.equal(earlier["t2d"], own["t2d"])
    assert {file: file.read_bytes() for file in before} == before


def test_the_weights_are_the_drafts_and_the_moments_are_not(started, train, rows):
    head, tuned = started
    run = train(
        f"task.path={rows}",
        *HEAD,
        f"target.run={tuned}",
        f"target.draft={head}",
        "name=on",
        "max_steps=1",
        "optimizer.lr=1e-12",
    )
    expected = load_file(head / "drafter" / "model.safetensors")
    saved = checkpoints.load(checkpoints.chosen(run / "checkpoints", "last"))
    assert all(
        torch.allclose(tensor, expected[name], atol=1e-6)
        for name, tensor in saved["drafter"].items()
    )
    assert all(
        float(state["step"]) == 1 for state in saved["optimizer_states"][0]["state"].values()
    )


def test_heads_that_do_not_fit_are_refused(started, rows, tmp_path, capsys):
    head, tuned = started

    def message(draft, target=tuned, *more):
        words = [f"draft={draft}", f"target.run={target}", "dry=true", *more]
        assert exit_code(realign.main, words) == 2
        said = capsys.readouterr()
        assert said.out == "", "the command is shown only where it can run"
        return said.err

    assert "that run has no drafter, or has not ended yet" in message(tuned)
    assert "it is no drafter's folder" in message(tmp_path)
    assert "is no run folder" in message(head, tmp_path)
    assert "a head that is re-aligned stays what it is" in message(
        head, tuned, "drafter=mtp_medusa"
    )
    assert "Did you mean draft?" in message(head, tuned, "drift=3")
    assert "optimizer.lrr" in message(head, tuned, "optimizer.lrr=1")
    lora = ("drafter_adapter=lora", "drafter_adapter.target_modules=[nowhere]")
    assert "drafter_adapter.target_modules has 'nowhere'" in message(head, tuned, *lora)
    folder = tmp_path / "copy"
    shutil.copytree(head / "drafter", folder)
    content = json.loads((folder / "config.json").read_text())

    def changed(**values):
        (folder / "config.json").write_text(
            json.dumps(content | {"target": content["target"] | values})
        )
        return folder

    assert "whose hidden_size is 32; this model's is 16" in message(changed(hidden_size=32))
    assert "this base has other weights" in message(changed(fingerprint="another"))
    assert "another tokenizer" in message(changed(tokenizer="another"))
    assert realign.main([f"draft={changed()}", f"target.run={tuned}", "dry=true"]) == 0
    arguments = capsys.readouterr().out
    assert f"target.draft={folder}" in arguments
    assert "drafter=eagle3 drafter.offsets=2" in arguments
    assert f"task.path={json.dumps(str(rows))}" in arguments
    base = instantiate(yaml.safe_load((tuned / "run.yaml").read_text())["config"]["base"])
    settings = content["drafter"]
    io.check(changed(), base, settings | {"eta": 1.0, "lr_scale": 2.0})
    with pytest.raises(
        DrafterError, match=r"of other settings: drafter\.norm_output: False there, True here"
    ):
        io.check(folder, base, settings | {"norm_output": True})


def test_a_target_that_is_gone_is_told(started, train, rows, tmp_path):
    """Heads that are not taught by distributions have no expected tokens."""
    _, tuned = started
    medusa = (
        f"task.path={rows}",
        "adapter=none",
        "objective=distill",
        "drafter=mtp_medusa",
        "max_steps=1",
        "task.eval_fraction=0.2",
    )
    other = shutil.copytree(tuned, tmp_path / "other")
    head = train(*medusa, f"target.run={other}", "name=head")
    shutil.rmtree(other)
    run = train(*medusa, f"target.run={tuned}", f"target.draft={head}", "name=on")
    actual = realigned.measure(run, head / "drafter", 4)
    assert "is no run folder" in actual[0]["not_measured"]
    assert "accepted" in actual[1]
    assert "expected" not in actual[1]
    text = realigned.table(actual)
    assert "before fine-tuning: not measured, since" in text
    assert text.splitlines()[2].endswith("other@3 |  |  |  |  |  |  |")
