"""SpIEL in the real program: what it logs, that it resumes to the same bits wherever it is cut, and
that processes agree."""

from __future__ import annotations

import pytest
import torch

from adapters.delta import AdapterError
from tests.toys.power_cuts import PowerCut, cut_at, outcome
from trainer.models.base import Base
from trainer.storage import checkpoints, journal

SETTINGS = (
    "adapter.density=0.1",
    "adapter.reselection_steps=4",
    "adapter.accumulation_steps=2",
    "adapter.initial_rate=0.8",
    "adapter.weight_decay=0.5",
    "adapter.gradient=gathered",
    "max_steps=11",
    "batch_size=2",
    "accumulate=2",
    "callbacks.checkpoints.every=1",
    "callbacks.checkpoints.keep=99",
    "callbacks.evaluation.every=11",
    "callbacks.evaluation.max_new_tokens=8",
    "report=false",
)
CASES = {
    "AG": ("adapter=spiel",),
    "MA": ("adapter=spiel_ma", "adapter.momentum=0.5"),
    "bf16 values": ("adapter=spiel", "adapter.sparse_dtype=bfloat16"),
}


def reselections(run):
    return [row for row in journal.read(run / "metrics.jsonl") if row["kind"] == "adapter"]


def support(run, step):
    saved = checkpoints.Checkpoint.at(run / "checkpoints", step)
    tensors = checkpoints.load(saved)["adapter"]["tensors"]
    return {name: tensor for name, tensor in tensors.items() if name.endswith(".indices")}


@pytest.mark.parametrize("case", CASES)
def test_it_resumes_to_the_same_bits_wherever_it_is_cut(train, chats, monkeypatch, case):
    settings = (f"task.path={chats}", *CASES[case], *SETTINGS)
    whole = train(*settings, "name=alone")
    expected = outcome(whole)
    for step in (5, 7):  # in a window, and between two
        with monkeypatch.context() as patch:
            cut_at(patch, step)
            with pytest.raises(PowerCut):
                train(*settings, "name=cut", "resume=auto")
    actual = outcome(train(*settings, "name=cut", "resume=auto"))
    assert actual[1] == expected[1]
    assert actual[2] == expected[2]
    assert actual[0].keys() == expected[0].keys()
    assert all(torch.equal(actual[0][name], expected[0][name]) for name in expected[0])
    losses = [row["loss"] for row in expected[1] if row["kind"] == "evaluation"]
    assert losses[-1] < losses[0]

    reported = reselections(whole)
    assert [row["step"] for row in reported] == [2, 6, 10]
    assert [row["rate"] for row in reported] == pytest.approx([1.0, 0.8 * 5 / 11, 0.8 / 11])
    now = support(whole, 2)
    total = sum(len(indices) for indices in now.values())
    first = now
    for row in reported:
        before, now = support(whole, row["step"] - 1), support(whole, row["step"])
        new = sum(len(set(now[name].tolist()) - set(before[name].tolist())) for name in now)
        stayed = sum(len(set(now[name].tolist()) & set(first[name].tolist())) for name in now)
        assert row["replaced"] == new
        assert row["replaced_share"] == pytest.approx(new / total)
        assert row["still_of_first"] == pytest.approx(stayed / total)
    assert reported[0]["replaced_share"] > 0.5
    assert reported[1]["replaced"] > 0
    assert all(torch.equal(now[name], support(whole, 11)[name]) for name in now)


@pytest.mark.slow
def test_two_processes_have_one_support(warm_program, chats):
    settings = [
        "+experiment=smoke",
        f"task.path={chats}",
        "adapter=spiel",
        *SETTINGS,
        "max_steps=7",
        "precision=fp32",
    ]
    two = ("name=both", "lightning=cpu", "lightning.devices=2", "lightning.strategy=ddp")
    done = warm_program(*settings, *two, module="trainer")
    assert done.returncode == 0, done.stdout + done.stderr
    reported = reselections(chats.parent / "runs" / "both")
    assert [row["step"] for row in reported] == [2, 6]
    # At the second one the processes' sums choose among the candidates.
    assert all(row["replaced"] > 0 for row in reported)


def test_a_window_that_does_not_end_is_told_before_a_model_is_loaded(train, chats, monkeypatch):
    monkeypatch.setattr(Base, "load", None)
    with pytest.raises(
        AdapterError, match=r"accumulation_steps=4 must be less than adapter.reselection_steps=4"
    ):
        train(
            f"task.path={chats}",
            "adapter=spiel",
            "adapter.reselection_steps=4",
            "adapter.accumulation_steps=4",
        )
