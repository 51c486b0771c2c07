"""A run that is resumed with another batch size, where a step stays the same."""

from __future__ import annotations

import pytest
import torch

from tests.toys.power_cuts import PowerCut, cut_at, outcome
from trainer.storage.checkpoints import CheckpointError

COMMON = (
    "max_steps=7",
    "callbacks.checkpoints.every=2",
    "callbacks.evaluation.every=3",
    "callbacks.evaluation.max_new_tokens=8",
    "check_export=false",
    "report=false",
)


def test_the_same_rows_in_other_micro_batches_end_alike(train, chats, monkeypatch):
    """One of 8, then 4 of 2, then 2 of 4: the adapter differs from an uninterrupted run's by
    rounding only, and by much more if a step had other rows."""
    words = (f"task.path={chats}", *COMMON)
    expected = outcome(train(*words, "batch_size=8", "name=alone"))
    other = outcome(train(*words, "batch_size=4", "name=other"))
    for size, at in ((8, 3), (2, 6)):
        with monkeypatch.context() as patch:
            cut_at(patch, at)
            with pytest.raises(PowerCut):
                train(
                    *words,
                    f"batch_size={size}",
                    f"accumulate={8 // size}",
                    "name=cut",
                    "resume=auto",
                )
    actual = outcome(train(*words, "batch_size=4", "accumulate=2", "name=cut", "resume=auto"))

    def distance(a, b):
        return max(float((a[0][name] - b[0][name]).abs().max()) for name in a[0])

    assert distance(actual, expected) < 1e-4
    assert distance(other, expected) > 1e-3
    assert [row["step"] for row in actual[1]] == [row["step"] for row in expected[1]]
    for mine, its in zip(actual[1], expected[1], strict=True):
        assert mine["loss"] == pytest.approx(its["loss"], rel=1e-4)
    assert all(torch.isfinite(tensor).all() for tensor in actual[0].values())


@pytest.mark.parametrize(
    ("words", "changed", "says"),
    [
        ((), ("batch_size=4",), "batch_size: 8 in the run, 4 now"),
        (
            ("group_by_length=true",),
            ("batch_size=4", "accumulate=2"),
            "the same, but group_by_length=true orders rows by micro-batches",
        ),
        (
            ("adapter.dropout=0.1",),
            ("batch_size=4", "accumulate=2"),
            "the same, but adapter.dropout=0.1 draws numbers for each micro-batch",
        ),
        (
            ("adapter=rosa", "adapter.warmup_steps=1", "adapter.density=0.05"),
            ("batch_size=4", "accumulate=2"),
            "the same, but RoSAAdapter selects entries by the gradients of micro-batches",
        ),
        (
            ("penalty=deft",),
            ("batch_size=4", "accumulate=2"),
            "the same, but a penalty is a mean over a micro-batch",
        ),
    ],
)
def test_another_step_is_refused(train, chats, words, changed, says):
    common = (f"task.path={chats}", *words, "name=run", "callbacks.evaluation=null")
    train(*common, "batch_size=8", "max_steps=2")
    with pytest.raises(CheckpointError, match=says):
        train(*common, *changed, "max_steps=2", "resume=auto")
