"""Runs that go back to a good checkpoint when their loss explodes."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.toys.power_cuts import PowerCut, cut_at, outcome
from trainer.callbacks.rollback import Exploded, Rollback
from trainer.data.batches import BatchOrder
from trainer.models.losses import NonFinite
from trainer.session import session
from trainer.storage import checkpoints
from trainer.training.finetune import FineTune

WORDS = (
    "callbacks=[default,rollback]",
    "callbacks.rollback.window=4",
    "callbacks.rollback.steps=2",
    "callbacks.checkpoints.every=2",
    "callbacks.evaluation.every=null",
    "callbacks.evaluation.samples=0",
    "max_steps=12",
    "batch_size=2",
)


def judged(losses: list[float], **settings: Any) -> int | None:
    """The number of the step that is the last of too many bad ones; None if there is none."""
    state: Any = SimpleNamespace(rows_of=lambda sequences: [], doubtful=False)
    rollback = Rollback(state, **{"factor": 3.0, "window": 4, "steps": 2, "times": 1} | settings)
    for step, loss in enumerate(losses, 1):
        sums = {"loss": torch.tensor(5 * loss), "tokens": torch.tensor(5), "sequences": []}
        try:
            rollback.check(SimpleNamespace(sums=sums, skipped_in_a_row=0, step=step))
        except Exploded:
            return step
        assert state.doubtful == (rollback.bad > 0)
    return None


@pytest.mark.parametrize(
    ("losses", "settings", "at"),
    [
        ([1, 1, 1, 1, 4, 4], {}, 6),
        ([1, 1, 1, 1, 4, 1, 4, 1], {}, None),  # not in a row
        ([1, 1, 1, 1, 2.9, 2.9, 2.9], {}, None),  # not above three times the median
        ([1, 1, 4, 4, 4, 4], {}, None),  # no loss is too high before there is a median
        ([1, 1, 1, 1, 4, 4], {"factor": None}, None),
        ([1, float("nan"), float("inf")], {"factor": None}, 3),
        ([1, 1, 1, 1, 4, 4, 4], {"steps": 3}, 7),
        ([9, 9, 9, 9, 1, 1, 1, 1, 4, 4], {}, 10),  # the median runs along
        ([1, 1, 1, 1, 4, float("nan")], {}, 6),
    ],
)
def test_bad_steps_are_those_far_above_the_running_median(losses, settings, at):
    assert judged(losses, **settings) == at


@pytest.mark.parametrize("epochs", [None, 3.0])
def test_skipped_rows_are_replaced_by_the_next_ones_of_the_order(epochs):
    def rows(skips: list[tuple[int, int]]) -> list[list[int]]:
        order = BatchOrder(np.full(7, 5), np.full(7, 4), 0, 1, 2, epochs=epochs)
        order.skips = skips
        steps = order.steps(None, None) if epochs else 11
        assert steps == 11
        return [
            [pick.sequence for batch in order.micro_batches(step) for pick in batch]
            for step in range(steps)
        ]

    plain = rows([])
    assert rows([(4, 3)])[:4] == plain[:4]
    assert rows([(4, 3)])[4:8] == plain[7:11] or epochs  # the last step is a smaller one
    assert rows([(4, 3)])[4:7] == plain[7:10]
    assert rows([(4, 1), (5, 2)])[4] == plain[5]
    assert rows([(4, 1), (5, 2)])[5:7] == plain[8:10]
    assert [len(step) for step in rows([(4, 3)])] == [len(step) for step in plain]


def poisoned(patch: Any, step: int, factor: float, count: int = 1) -> None:
    """Multiply the loss of the rows that the plain order has at `step` and after it. The same steps
    with other rows are left alone."""
    whole = FineTune.loss_of
    order = session._loader
    rows: list[list[int]] = []

    def loader(recipe: Any, *args: Any) -> Any:
        plain = [
            [sequence for sequence, _ in recipe.order.window(at)]
            for at in range(step, step + count)
        ]
        rows[:] = plain
        return order(recipe, *args)

    def loss_of(self: Any, batch: dict[str, Any], share: float = 1.0) -> Any:
        loss = whole(self, batch, share)
        if batch["sequences"] in rows:
            self.sums["loss"] = self.sums["loss"] * factor
            return loss * factor
        return loss

    patch.setattr(session, "_loader", loader)
    patch.setattr(FineTune, "loss_of", loss_of)


def test_a_run_that_explodes_goes_back_and_is_resumed_with_the_same_bits(
    train, chats, monkeypatch, caplog
):
    words = (f"task.path={chats}", *WORDS, "resume=auto")
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        poisoned(patch, 6, 1e4, count=2)
        run = train(*words, "name=back")
    record = yaml.safe_load((run / "run.yaml").read_text())
    assert [(back["at"], back["steps"]) for back in record["rollbacks"]] == [(6, 2)]
    assert len(record["starts"]) == 2
    assert "Going back to step 6" in caplog.text
    assert "rollback 1 of at most 3" in caplog.text
    weights, rows, counters = outcome(run)
    assert counters["step"] == 12
    assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(1, 13))
    assert [(row["step"], row["from"]) for row in rows if row["kind"] == "rollback"] == [(6, 8)]

    assert "the run went back to step 6" in (run / "report.html").read_text()

    # the same as a run that had never met those rows
    with monkeypatch.context() as patch:
        patch.setattr(session, "skips_of", lambda *_: [(6, 2)])
        make = session.Session.make_recipe

        def make_recipe(self: Any) -> Any:
            recipe = make(self)
            recipe.order.skips = [(6, 2)]
            return recipe

        patch.setattr(session.Session, "make_recipe", make_recipe)
        clean = outcome(train(*words, "name=clean"))
    assert all(torch.equal(weights[name], clean[0][name]) for name in weights)
    plain = outcome(train(*words, "name=plain"))
    assert not all(torch.equal(weights[name], plain[0][name]) for name in weights)

    # killed after it went back, and resumed
    with monkeypatch.context() as patch:
        poisoned(patch, 6, 1e4, count=2)
        cut_at(patch, 11)
        with pytest.raises(PowerCut):
            train(*words, "name=cut")
    actual = outcome(train(*words, "name=cut"))
    assert all(torch.equal(weights[name], actual[0][name]) for name in weights)
    assert [r for r in actual[1] if r["kind"] == "step"] == [r for r in rows if r["kind"] == "step"]


def test_nan_goes_back_too_and_not_more_often_than_allowed(train, chats, monkeypatch, tmp_path):
    words = (f"task.path={chats}", *WORDS, "callbacks.rollback.times=1", "resume=auto")
    poisoned(monkeypatch, 5, float("nan"), count=6)
    with pytest.raises(NonFinite, match=r"has gone back 1 times already .*times=1"):
        train(*words, "objective.nonfinite_limit=2", "name=often")
    run = tmp_path / "runs" / "often"
    record = yaml.safe_load((run / "run.yaml").read_text())
    assert [(back["at"], back["steps"]) for back in record["rollbacks"]] == [(4, 3)]
    # a checkpoint of a bad step is not written
    assert all(each.step <= 4 for each in checkpoints.complete(run / "checkpoints"))


def test_a_damaged_checkpoint_is_passed_over_and_leaves_nothing(train, chats, monkeypatch, caplog):
    """The resume that follows starts from the older one, so the damaged one must be gone."""
    whole = checkpoints.fault

    def fault(checkpoint: Any) -> str | None:
        return "its content has changed" if checkpoint.step == 6 else whole(checkpoint)

    remove, removed = checkpoints.remove_after, []
    monkeypatch.setattr(checkpoints, "fault", fault)

    def remove_after(folder: Any, step: int) -> None:
        removed.append(step)
        remove(folder, step)
        assert [each.step for each in checkpoints.complete(folder)][-1] == 4
        monkeypatch.setattr(checkpoints, "fault", whole)  # a new one of step 6 is whole

    monkeypatch.setattr(checkpoints, "remove_after", remove_after)
    poisoned(monkeypatch, 6, 1e4, count=2)
    run = train(f"task.path={chats}", *WORDS, "resume=auto")
    record = yaml.safe_load((run / "run.yaml").read_text())
    assert [(back["at"], back["steps"]) for back in record["rollbacks"]] == [(4, 4)]
    assert removed == [4]
    assert outcome(run)[2]["step"] == 12


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(train, chats, monkeypatch):
    poisoned(monkeypatch, 0, float("nan"), count=3)
    with pytest.raises(NonFinite, match="no checkpoint from before step 1 to go back to"):
        train(f"task.path={chats}", *WORDS)


def test_without_the_callback_nothing_goes_back(train, chats, monkeypatch):
    poisoned(monkeypatch, 4, float("nan"), count=6)
    with pytest.raises(NonFinite, match="3 steps in a row"):
        train(f"task.path={chats}", *WORDS[3:])
