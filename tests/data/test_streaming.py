"""Rows that are read while training: the same from any step, each once an epoch, shared out over
the ranks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tasks.completion import Completion
from tasks.reading import DataError
from tests.conftest import write_rows
from trainer.data.batches import Collate
from trainer.data.render import Renderer
from trainer.data.streaming import StreamingBatches
from trainer.models.on_host import Host

SHAPES = [(2, 1, 1), (3, 2, 1), (2, 1, 3), (2, 2, 2)]  # batch_size, accumulate, ranks
LONG = 10**6  # more steps than there are rows


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """23 texts; row i is i + 1 letters long."""
    return write_rows(tmp_path / "rows.jsonl", [{"text": chr(97 + i) * (i + 1)} for i in range(23)])


def stream(
    tiny: Any,
    file: Path,
    steps: int = LONG,
    start: int = 0,
    rank: int = 0,
    ranks: int = 1,
    block: int = 5,
    on_bad: str = "raise",
    **changes: Any,
) -> StreamingBatches:
    task = Completion(
        str(file), "train", None, "test", 0.0, None, None, {}, True, block, on_bad, None
    )
    config = {
        "max_epochs": 1,
        "max_length": 512,
        "overlong": "raise",
        "batch_size": 2,
        "accumulate": 1,
        "seed": 0,
    } | changes
    return StreamingBatches(
        task,
        Renderer(tiny.tokenizer, task),
        Collate(0, False, False),
        config,
        steps,
        start,
        rank,
        ranks,
    )


def trained(batch: dict[str, Any]) -> list[str]:
    """The places of a batch's rows that train."""
    return [
        where
        for where, labels in zip(batch["sequences"], batch["labels"], strict=True)
        if (labels != -100).any()
    ]


def line(where: str) -> int:
    return int(where.rpartition(":")[2])


def lines(built: StreamingBatches) -> list[int]:
    return [line(where) for where, _ in built.rows()]


def same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    def equal(x: Any, y: Any) -> bool:
        if torch.is_tensor(x):
            return torch.equal(x, y)
        return same([vars(x)], [vars(y)]) if isinstance(x, Host) else bool(x == y)

    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(equal(x[k], y[k]) for k in x)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("epochs", [1, 2, 3])
@pytest.mark.parametrize("block", [1, 4, 5, 23, 100])
def test_each_row_comes_once_an_epoch(tiny, numbered, block, epochs):
    assert Counter(lines(stream(tiny, numbered, block=block, max_epochs=epochs))) == dict.fromkeys(
        range(1, 24), epochs
    )


@pytest.mark.parametrize("block", [1, 5, 10])
def test_rows_are_shuffled_within_blocks(tiny, numbered, block):
    actual = lines(stream(tiny, numbered, block=block))
    for first in range(0, 23, block):
        assert sorted(actual[first : first + block]) == list(
            range(first + 1, min(first + block, 23) + 1)
        )
    assert (actual == sorted(actual)) == (block == 1)


def test_each_block_has_an_order_of_its_own_and_a_block_may_span_epochs(tiny, numbered):
    actual = lines(stream(tiny, numbered, block=10, max_epochs=4))
    read = [number for _ in range(4) for number in range(1, 24)]
    orders = set()
    for first in range(0, 90, 10):
        assert sorted(actual[first : first + 10]) == sorted(read[first : first + 10])
        if len(set(read[first : first + 10])) == 10:
            orders.add(
                tuple(
                    read[first : first + 10].index(number) for number in actual[first : first + 10]
                )
            )
    assert len(orders) == 9


def test_the_order_depends_on_the_seed_only(tiny, numbered):
    first = lines(stream(tiny, numbered, block=23))
    np.random.seed(7)
    torch.manual_seed(7)
    assert lines(stream(tiny, numbered, block=23)) == first
    assert lines(stream(tiny, numbered, block=23, seed=1)) != first


@pytest.mark.long
@pytest.mark.parametrize(("batch_size", "accumulate", "ranks"), SHAPES)
def test_a_stream_that_starts_at_a_step_goes_on_as_if_it_had_not_stopped(
    tiny, numbered, batch_size, accumulate, ranks
):
    options = {"ranks": ranks, "batch_size": batch_size, "accumulate": accumulate, "max_epochs": 2}
    steps = -(-46 // (batch_size * accumulate * ranks))
    for rank in range(ranks):
        whole = list(stream(tiny, numbered, steps, 0, rank, **options))
        assert len(whole) == steps * accumulate
        for start in range(steps + 1):
            built = stream(tiny, numbered, steps, start, rank, **options)
            assert same(list(built), whole[start * accumulate :])
            assert len(built) == len(whole)  # counted from step 0


@pytest.mark.parametrize(("batch_size", "accumulate", "ranks"), SHAPES)
def test_ranks_take_disjoint_shares_that_make_up_the_stream(
    tiny, numbered, batch_size, accumulate, ranks
):
    options = {"ranks": ranks, "batch_size": batch_size, "accumulate": accumulate}
    shares = [list(stream(tiny, numbered, rank=rank, **options)) for rank in range(ranks)]
    # else a rank would wait for the others without end
    assert len({len(share) for share in shares}) == 1
    in_turn = [
        where
        for batches in zip(*shares, strict=True)
        for batch in batches
        for where in trained(batch)
    ]
    assert [line(where) for where in in_turn] == lines(stream(tiny, numbered))


@pytest.mark.parametrize(("batch_size", "accumulate", "ranks"), SHAPES)
def test_window_tokens_are_the_trained_tokens_of_the_whole_step(
    tiny, numbered, batch_size, accumulate, ranks
):
    options = {"ranks": ranks, "batch_size": batch_size, "accumulate": accumulate}
    shares = [list(stream(tiny, numbered, rank=rank, **options)) for rank in range(ranks)]
    tokens = 0
    for first in range(0, len(shares[0]), accumulate):
        window = [batch for share in shares for batch in share[first : first + accumulate]]
        # A row's end token is one more than its letters, and its first letter is not predicted.
        naive = sum(line(where) for batch in window for where in trained(batch))
        assert {batch["window_tokens"] for batch in window} == {naive}
        assert sum(int((batch["labels"] != -100).sum()) for batch in window) == naive
        tokens += sum(batch["tokens"] for batch in window)
    assert tokens == sum(number + 1 for number in range(1, 24))


@pytest.mark.parametrize(
    ("steps", "epochs", "expected"),
    [(3, 1, 3), (3, None, 3), (40, None, 40), (40, 1, 12), (12, 1, 12), (0, 1, 0)],
)
def test_a_stream_ends_with_its_steps_or_its_data(tiny, numbered, steps, epochs, expected):
    assert len(list(stream(tiny, numbered, steps, max_epochs=epochs))) == expected


def test_what_fills_up_the_last_step_trains_nothing(tiny, numbered):
    *_, last = stream(tiny, numbered, batch_size=20)
    assert last["input_ids"].shape[0] == 20
    assert len(trained(last)) == 3
    assert last["tokens"] == sum(line(where) + 1 for where in trained(last))


def test_batches_hold_the_tokens_of_the_rows_that_they_name(tiny, numbered):
    for batch in stream(tiny, numbered, batch_size=3):
        for where, ids in zip(batch["sequences"], batch["input_ids"], strict=True):
            letters = chr(96 + line(where)) * line(where)
            expected = tiny.tokenizer(letters + "<|im_end|>")["input_ids"]
            assert ids.tolist() == expected + [0] * (len(ids) - len(expected))


@pytest.mark.parametrize(
    ("overlong", "stored"), [("drop", range(1, 10)), ("truncate", range(1, 24))]
)
def test_overlong_rows_are_dropped_or_cut_and_counted(tiny, numbered, overlong, stored):
    built = stream(tiny, numbered, max_length=10, overlong=overlong)
    rows = list(built.rows())
    assert sorted(line(where) for where, _ in rows) == list(stored)
    assert max(len(row.ids) for _, row in rows) == 10
    assert (built.report.rows, built.report.kept) == (23, len(stored))
    assert (built.report.dropped, built.report.truncated) == (
        (14, 0) if overlong == "drop" else (0, 14)
    )


def test_an_overlong_row_is_an_error_where_asked(tiny, numbered):
    with pytest.raises(DataError, match=r"rows\.jsonl:10: 11 tokens"):
        lines(stream(tiny, numbered, max_length=10))


def test_broken_rows_are_an_error_or_skipped_and_counted(tiny, numbered):
    content = numbered.read_text("utf-8").splitlines()
    content[6] = "{"
    numbered.write_text("\n".join(content), "utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl:7: not JSON"):
        lines(stream(tiny, numbered))
    built = stream(tiny, numbered, on_bad="skip")
    assert sorted(lines(built)) == [number for number in range(1, 24) if number != 7]
    assert built.report.skipped == 1


@pytest.mark.parametrize("epochs", [1, None])
def test_a_stream_without_a_usable_row_is_an_error_and_no_endless_loop(tiny, numbered, epochs):
    with pytest.raises(DataError, match="no row of the stream is usable: 0 of 23"):
        list(stream(tiny, numbered, max_epochs=epochs, max_length=1, overlong="drop"))
