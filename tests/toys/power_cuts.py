"""Runs that end amid a step as a power cut ends them, and what they leave."""

from __future__ import annotations

import pytest

from trainer.storage import checkpoints, journal
from trainer.training.finetune import FineTune

TIMES = ("seconds", "answer_seconds", "tokens_per_s", "trained_per_s")


class PowerCut(Exception):
    """Stands for a process that ends without a chance to save."""


def cut_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the run break off when it is about to do a step."""
    whole = FineTune.on_train_batch_start

    def broken(self, batch, batch_idx):
        if self.step == step and batch_idx % self.accumulate == self.accumulate - 1:
            raise PowerCut
        whole(self, batch, batch_idx)

    monkeypatch.setattr(FineTune, "on_train_batch_start", broken)


def outcome(run):
    """(final trained tensors, logged rows without times)."""
    last = checkpoints.load(checkpoints.chosen(run / "checkpoints", "last"))
    rows = [
        {k: v for k, v in row.items() if k not in TIMES}
        for row in journal.read(run / "metrics.jsonl")
    ]
    return last["adapter"]["tensors"], rows, last["counters"]
