"""Rows with weights, from a file to the loss of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_rows
from trainer.storage import journal


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in journal.read(run / "metrics.jsonl") if row["kind"] == "step"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_step_weighs_its_rows(train, tmp_path, streaming):
    """The first step's loss, of an untrained adapter, is the weighted mean of the rows' losses."""

    def first(name: str, weights: list[float] | None, *more: str) -> float:
        rows: list[dict[str, Any]] = [
            {"prompt": f"{10 + i}+{20 + i}=", "completion": f"{30 + 2 * i}"} for i in range(4)
        ]
        if weights is not None:
            rows = [row | {"w": weight} for row, weight in zip(rows, weights, strict=True)]
        column = ["task.weight_column=w"] if weights is not None else []
        run = train(
            f"task.path={write_rows(tmp_path / f'{name}.jsonl', rows)}",
            f"task.eval_path={tmp_path / f'{name}.jsonl'}",
            "callbacks.evaluation=null",
            "optimizer.lr=0.0001",
            "batch_size=4",
            "accumulate=1",
            "max_steps=1",
            "packing=false",
            f"task.streaming={str(streaming).lower()}",
            "task.shuffle_block=1",  # a stream repeats its rows in their order
            f"name={name}",
            *column,
            *more,
        )
        return losses(run)[0]

    plain = first("plain", None)
    assert first("equal", [3.0, 3.0, 3.0, 3.0]) == pytest.approx(plain, rel=1e-6)
    alone = [first(f"only{i}", [float(i == j) for j in range(4)]) for i in range(2)]
    pair = first("pair", [1.0, 3.0, 0.0, 0.0])
    low, high = sorted(alone)
    assert low < pair < high
    # all answers have the same number of tokens
    assert pair == pytest.approx((alone[0] + 3 * alone[1]) / 4, rel=1e-5)
