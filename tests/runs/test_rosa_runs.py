"""RoSA through the real program: its phases, its mask, what it refuses, and that neither a cut nor
processes change what comes out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapters.delta import AdapterError
from tests.toys.power_cuts import PowerCut, cut_at, outcome
from trainer.config import limits
from trainer.config.errors import ConfigError
from trainer.models.base import Base
from trainer.storage import journal
from trainer.training.finetune import FineTune

ROSA = (
    "adapter=rosa",
    "adapter.rank=2",
    "adapter.density=0.1",
    "adapter.warmup_steps=2",
    "adapter.mask_steps=2",
    "adapter.count_mask_steps=true",
    "max_steps=7",
    "batch_size=2",
    "adapter.gradient=sampled",
    "callbacks.evaluation=null",
)
NO_CHECKPOINTS = "callbacks.checkpoints=null"  # and so nothing to load back and compare


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in journal.read(run / "metrics.jsonl") if row["kind"] == kind]


def rates(run: Path) -> list[float]:
    return [row["lr"] / 1e-2 for row in rows(run, "step")]


def masks(run: Path) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in load_file(run / "masks.safetensors").items()}


@pytest.fixture
def weightless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading weights is an error."""

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(Base, "load", load)


def test_a_run_tells_and_leaves_its_mask_and_a_second_takes_it(train, chats):
    settings = (f"task.path={chats}", *ROSA, "schedule=linear", "schedule.warmup=2", NO_CHECKPOINTS)
    run = train(*settings, "name=first")
    (row,) = rows(run, "adapter")
    assert row["step"] == 4
    assert {key for key in row if key not in ("kind", "step")} == {
        "mask_rows",
        "mask_columns",
        "mask_among_largest",
    }
    assert all(0 < value <= 1 for key, value in row.items() if key.startswith("mask"))
    actual = masks(run)
    assert len(actual) == 14
    # A rise of two steps and a fall of five; after the mask, a rise of two and a fall of one in the
    # three steps that are left.
    assert rates(run) == pytest.approx([1 / 2, 1, 1, 4 / 5, 1 / 2, 1, 1])
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    values = {name: tensor for name, tensor in saved.items() if name.endswith("values")}
    assert len(values) == 14
    assert all(tensor.any() for tensor in values.values())

    for source in ("masks.safetensors", "adapter"):
        second = train(*settings, f"adapter.mask={run / source}", "name=second", "max_steps=2")
        assert masks(second) == actual
        assert rates(second) == pytest.approx([1 / 2, 1])
        again = load_file(second / "adapter" / "adapter_model.safetensors")
        for name, tensor in saved.items():
            if name.endswith("indices"):
                assert torch.equal(again[name], tensor)
            # from the first step on: two Adam steps at most, of half the rate and all of it
            if name.endswith("values"):
                assert 1e-3 < again[name].abs().max() / 0.2857 <= 1.5e-2 * 1.01


def test_a_run_may_end_with_its_mask(train, chats, caplog):
    caplog.set_level("INFO", "trainer")
    run = train(f"task.path={chats}", *ROSA, "max_steps=4")
    assert "all 4 steps choose the mask, and none train with it" in caplog.text
    assert "loaded back by stock PEFT" in caplog.text
    assert "changes no logit" not in caplog.text
    assert len(masks(run)) == 14
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    assert not any(tensor.any() for name, tensor in saved.items() if name.endswith("values"))


COUNTED = ("adapter.count_mask_steps=false", "schedule=linear", "schedule.warmup=2")


def test_the_second_run_of_the_paper_is_whole(train, chats, caplog):
    caplog.set_level("INFO", "trainer")
    settings = (
        f"task.path={chats}",
        *ROSA,
        *COUNTED,
        "max_steps=5",
        "callbacks.checkpoints.every=1",
    )
    run = train(*settings)
    assert "4 steps choose the mask, 5 train the result" in caplog.text
    assert "4 of 9 steps (44%) choose the mask" in caplog.text
    # in the mask's steps the rates of a run of nine; then a rise of two and a fall of three
    assert rates(run) == pytest.approx([1 / 2, 1, 1, 6 / 7, 1 / 2, 1, 1, 2 / 3, 1 / 3])
    steps = rows(run, "step")
    for row in steps:  # both parts' rates, and the norms of both once both are trained
        assert row["lr/sparse"] == pytest.approx(0.2857 * row["lr/low_rank"])
        assert row["lr/low_rank"] == row["lr"]
        assert ("grad_norm/sparse" in row) == (row["step"] > 4)
        parts = [row.get(f"grad_norm/{part}", 0.0) for part in ("low_rank", "sparse")]
        assert math.hypot(*parts) == pytest.approx(row["grad_norm"], rel=1e-4)
    # another length keeps the mask's place
    longer = train(*settings, "max_steps=6", "name=longer")
    assert [row["step"] for row in rows(longer, "adapter")] == [4]
    assert len(rows(longer, "step")) == 10


def test_steps_that_depend_on_the_run_are_recorded_and_stay(train, chats):
    settings = (
        f"task.path={chats}",
        *ROSA,
        "adapter.count_mask_steps=false",
        "schedule=constant",
        "adapter.warmup_steps=0.5",
        "adapter.mask_steps=auto",
        "callbacks.checkpoints.every=1",
        "batch_size=16",
        "name=run",
    )
    run = train(*settings, "max_steps=2")
    config = limits.load_yaml(run / "run.yaml")["config"]["adapter"]
    assert (config["warmup_steps"], config["mask_steps"]) == (1, 2)
    assert len(rows(run, "step")) == 5
    train(*settings, "max_steps=4", "resume=auto")
    assert [row["step"] for row in rows(run, "step")] == list(range(1, 8))
    assert [row["step"] for row in rows(run, "adapter")] == [3]


def test_epochs_are_counted_from_the_mask_too(train, chats):
    settings = (f"task.path={chats}", *ROSA, *COUNTED, NO_CHECKPOINTS, "max_steps=null")
    alone = train(*settings, "max_epochs=1", "adapter.mask=random", "name=alone")
    run = train(*settings, "max_epochs=1", "name=run")
    assert len(rows(run, "step")) == 4 + len(rows(alone, "step"))


def test_what_a_mask_without_gradients_is_like_is_told_too(train, chats):
    run = train(
        f"task.path={chats}", *ROSA, NO_CHECKPOINTS, "adapter.mask=magnitude", "max_steps=2"
    )
    (row,) = rows(run, "adapter")
    assert row["step"] == 1
    assert row["mask_among_largest"] == 1
    assert 0 < row["mask_rows"] <= 1


# bad input


def test_a_mask_file_that_does_not_fit_is_refused_before_the_base_is_loaded(
    train, chats, weightless
):
    settings = (f"task.path={chats}", *ROSA)
    with pytest.raises(AdapterError, match="no such file"):
        train(*settings, f"adapter.mask={chats.parent / 'nothere'}")
    with pytest.raises(AdapterError, match="cannot be read as masks"):
        train(*settings, f"adapter.mask={chats}")


def test_a_mask_file_of_another_density_is_refused_before_the_base_is_loaded(train, chats, request):
    settings = (f"task.path={chats}", *ROSA)
    run = train(*settings, NO_CHECKPOINTS, "adapter.mask=random", "max_steps=1")
    request.getfixturevalue("weightless")
    with pytest.raises(AdapterError, match=r"has 2\d entries for .* ask for 5\d \(0\.19"):
        train(*settings, f"adapter.mask={run / 'masks.safetensors'}", "adapter.density=0.2")
    with pytest.raises(AdapterError, match="another model"):
        train(*settings, f"adapter.mask={run / 'masks.safetensors'}", "base.layers=1")


def test_a_warm_up_longer_than_the_run_is_refused_before_the_base_is_loaded(
    train, chats, weightless
):
    with pytest.raises(
        AdapterError, match=r"made after 4 steps .* and the run has 3: lower adapter.warmup_steps"
    ):
        train(f"task.path={chats}", *ROSA, "max_steps=3")


@pytest.mark.parametrize("adapter", ["rosa", "sparse"])
@pytest.mark.parametrize(
    ("density", "error", "message"),
    [
        ("0", ConfigError, "adapter.density"),
        ("1.5", ConfigError, "adapter.density"),
        ("-0.1", ConfigError, "adapter.density"),
        (
            "1e-4",
            AdapterError,
            "density 0.0001 of model.* is less than one of its 256 entries: raise it",
        ),
    ],
)
def test_a_density_that_cannot_be_is_refused_before_the_base_is_loaded(
    train, chats, weightless, adapter, density, error, message
):
    with pytest.raises(error, match=message):
        train(
            f"task.path={chats}",
            f"adapter={adapter}",
            f"adapter.density={density}",
            "adapter.warmup_steps=0",
        )


# steps that are not finite


def spoil(monkeypatch: pytest.MonkeyPatch, broken: set[tuple[int, int]]) -> None:
    """Make the loss of micro-batches (step, number) NaN."""
    whole = FineTune.training_step

    def spoilt(self: Any, batch: Any, batch_idx: int) -> Any:
        loss = whole(self, batch, batch_idx)
        if (self.step, batch_idx % self.accumulate) in broken:
            self.sums["loss"] = self.sums["loss"] + math.nan
            return loss * math.nan
        return loss

    monkeypatch.setattr(FineTune, "training_step", spoilt)


def test_micro_batches_that_are_not_finite_do_not_spoil_a_mask(train, chats, monkeypatch):
    settings = (
        f"task.path={chats}",
        *ROSA,
        NO_CHECKPOINTS,
        "accumulate=2",
        "adapter.warmup_steps=0",
        "max_steps=3",
    )
    # the second micro-batch of the first step makes the mask
    spoil(monkeypatch, {(0, 0), (1, 0), (1, 1)})
    run = train(*settings)
    assert [row["step"] for row in rows(run, "skipped")] == [1, 2]
    assert [row["step"] for row in rows(run, "adapter")] == [2]
    assert len(masks(run)) == 14


def test_a_mask_of_nothing_finite_is_an_error(train, chats, monkeypatch):
    spoil(monkeypatch, {(2, 0), (3, 0)})
    with pytest.raises(
        AdapterError,
        match=r"no micro-batch of the mask's steps had a finite gradient at model.layers.0",
    ):
        train(f"task.path={chats}", *ROSA)


# runs that are cut off, and processes


CASES = {  # settings, and the rates that they give
    "restart": ((), [1 / 2, 1, 1, 4 / 5, 1 / 2, 1, 1]),
    "the same low-rank part, and candidates": (
        (
            "adapter.restart_after_mask=false",
            "adapter.scores=candidates",
            "adapter.score=mean",
            "accumulate=2",
            "adapter.dropout=0.3",
        ),
        [1 / 2, 1, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5],
    ),
    "spa_only": (
        ("adapter.schedule=spa_only", "adapter.mask_steps=4", "adapter.sparse_lr_ratio=1"),
        [1 / 2, 1, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_cut_off_in_each_phase_it_ends_as_uninterrupted(train, chats, monkeypatch, case):
    """In the warm-up, between the mask's two steps, and just after it."""
    changes, its_rates = CASES[case]
    settings = (
        f"task.path={chats}",
        *ROSA,
        "callbacks.checkpoints.every=1",
        "schedule=linear",
        "schedule.warmup=2",
        *changes,
    )
    alone = train(*settings, "name=alone")
    for step in (1, 3, 4):
        with monkeypatch.context() as patch:
            cut_at(patch, step)
            with pytest.raises(PowerCut):
                train(*settings, "name=cut", "resume=auto")
    cut = train(*settings, "name=cut", "resume=auto")
    expected, actual = outcome(alone), outcome(cut)
    assert actual[1:] == expected[1:]
    assert rates(alone) == pytest.approx(its_rates)
    assert [row["step"] for row in actual[1] if row["kind"] == "adapter"] == [4]
    assert masks(cut) == masks(alone)
    assert actual[0].keys() == expected[0].keys()
    assert all(torch.equal(actual[0][name], expected[0][name]) for name in expected[0])
    for name, indices in masks(alone).items():
        assert expected[0][f"{name}.delta.indices"].tolist() == indices
        assert expected[0][f"{name}.delta.values"].any()
