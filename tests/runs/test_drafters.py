"""Drafters in whole runs: with an adapter, alone, and their files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from trainer.assembly.trained import load_trained
from trainer.drafters import DrafterError
from trainer.storage import checkpoints, journal

COMMON = (
    "max_steps=6",
    "batch_size=4",
    "callbacks.evaluation.every=3",
    "callbacks.evaluation.max_new_tokens=8",
    "adapter.dropout=0.2",
)


def saved(run):
    return checkpoints.load(checkpoints.chosen(run / "checkpoints", "last"))


def test_a_drafter_leaves_its_adapter_as_it_is(train, chats):
    """Bit for bit: gradients, their clipping, random draws and the evaluation's loss."""
    alone = train(f"task.path={chats}", *COMMON, "name=alone")
    both = train(f"task.path={chats}", *COMMON, "drafter=mtp_shared", "name=both")
    first, second = saved(alone)["adapter"]["tensors"], saved(both)["adapter"]["tensors"]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    losses = [
        [row["loss"] for row in journal.read(run / "metrics.jsonl") if row["kind"] == "evaluation"]
        for run in (alone, both)
    ]
    assert losses[0] == losses[1]
    attached = train(
        f"task.path={chats}", *COMMON, "drafter=mtp_shared", "drafter.detach=false", "name=attached"
    )
    third = saved(attached)["adapter"]["tensors"]
    assert not all(torch.equal(first[name], third[name]) for name in first)


@pytest.mark.parametrize("adapter", ["none", "rosa"])
def test_a_drafter_learns_with_any_adapter_and_alone(train, chats, adapter):
    more = ["adapter.warmup_steps=2", "adapter.density=0.1"] if adapter == "rosa" else []
    run = train(
        f"task.path={chats}",
        f"adapter={adapter}",
        "drafter=mtp_medusa",
        "drafter.offsets=2",
        "max_steps=8",
        *more,
    )
    rows = journal.read(run / "metrics.jsonl")
    first, last = ([row for row in rows if row["kind"] == "evaluation"][i] for i in (0, -1))
    for offset in (1, 2):
        assert last[f"offset{offset}/loss"] < first[f"offset{offset}/loss"]
        assert 0 <= last[f"offset{offset}/top1"] <= last[f"offset{offset}/top5"] <= 1
    assert last["accepted"] >= 1
    assert (first["loss"] == last["loss"]) == (adapter == "none")
    assert "offset2/top1" in next(row for row in rows if row["kind"] == "step")
    assert (run / "adapter").exists() == (adapter != "none")
    config = json.loads((run / "drafter" / "config.json").read_text())
    assert config["drafter"]["_target_"] == "trainer.drafters.medusa.MedusaHeads"
    actual = load_trained(str(run))
    tensors = load_file(run / "drafter" / "model.safetensors")
    assert actual.drafter is not None
    own = actual.drafter.state()
    assert own.keys() == tensors.keys()
    assert all(torch.equal(own[name], tensors[name]) for name in own)


def test_byte_level_prediction_of_eight(train, chats):
    """The paper's byte model: the tiny base reads bytes, and heads predict eight of them, the next
    one included."""
    run = train(
        f"task.path={chats}",
        "task.train_on=all",
        "drafter=mtp_parallel",
        "drafter.offsets=7",
        "max_steps=3",
        "max_length=256",
    )
    last = [row for row in journal.read(run / "metrics.jsonl") if row["kind"] == "step"][-1]
    assert any(f"offset{k}/loss" in last for k in range(1, 8))


def test_rows_shorter_than_the_offsets_are_refused(train, chats):
    with pytest.raises(Exception, match="a drafter of 60 offsets needs 62"):
        train(f"task.path={chats}", "drafter=mtp_medusa", "drafter.offsets=60")


def test_weights_of_another_drafter_are_refused(train, chats):
    run = train(f"task.path={chats}", "drafter=mtp_medusa", "drafter.offsets=2", "max_steps=2")
    actual = load_trained(str(run))
    assert actual.drafter is not None
    state = actual.drafter.state()
    with pytest.raises(DrafterError, match=r"of another model or of other settings: .* differ"):
        actual.drafter.load_state(dict(list(state.items())[:-1]))
