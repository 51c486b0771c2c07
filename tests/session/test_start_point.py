"""Where a run starts is the same on all ranks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment

from trainer.session.start_point import StartPoint
from trainer.storage.checkpoints import Checkpoint
from trainer.training.ranks import decide_on_rank0

STARTS = [
    StartPoint(),
    StartPoint(8, Checkpoint.at(Path("runs/ü/checkpoints"), 8), drops_cooldown=True),
    StartPoint(
        3, Checkpoint.at(Path("x"), 3), parent={"id": "a", "run": "b", "step": 3, "sha256": "c"}
    ),
    StartPoint(9, Checkpoint.at(Path("x"), 9), ended="has done its 9 steps"),
]


@pytest.mark.parametrize("start", STARTS)
def test_a_start_point_is_read_as_it_was_written(start):
    assert StartPoint.from_json(start.to_json()) == start
    assert start.fresh == (start.checkpoint is None)


def test_run_yaml_stays_on_rank_0():
    start = StartPoint(3, Checkpoint.at(Path("x"), 3), earlier={"config": {"secret": "hunter2"}})
    assert "hunter2" not in start.to_json()
    assert StartPoint.from_json(start.to_json()) == StartPoint(3, Checkpoint.at(Path("x"), 3))


def rank(number: int, ranks: int = 2, environment: Any = None, sent: Any = None) -> Any:
    strategy = SimpleNamespace(
        cluster_environment=environment, broadcast=lambda value: value if number == 0 else sent
    )
    return SimpleNamespace(world_size=ranks, is_global_zero=number == 0, strategy=strategy)


@pytest.mark.parametrize("start", STARTS)
def test_ranks_that_lightning_starts_read_the_decision_of_rank_0(start, monkeypatch):
    monkeypatch.delenv("GRAFT_DECIDED", raising=False)
    environment = LightningEnvironment()
    assert decide_on_rank0(rank(0, environment=environment), lambda: start, StartPoint) == start

    def never() -> StartPoint:
        raise AssertionError("rank 1 decided")

    assert decide_on_rank0(rank(1, environment=environment), never, StartPoint) == start
    monkeypatch.delenv("GRAFT_DECIDED")


def test_ranks_that_others_start_get_the_decision_or_the_error_of_rank_0():
    start = STARTS[1]
    assert decide_on_rank0(rank(0), lambda: start, StartPoint) is start
    other = rank(1, sent=(start.to_json(), None))
    assert decide_on_rank0(other, lambda: STARTS[0], StartPoint) == start
    failed = rank(1, sent=(None, ValueError("damaged")))
    with pytest.raises(ValueError, match="damaged"):
        decide_on_rank0(failed, lambda: STARTS[0], StartPoint)


def test_one_rank_decides_alone():
    assert decide_on_rank0(rank(0, ranks=1), lambda: STARTS[2], StartPoint) is STARTS[2]


def test_the_text_is_json():
    assert json.loads(STARTS[1].to_json())["step"] == 8
