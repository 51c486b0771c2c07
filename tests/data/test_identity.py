"""The identity of rows follows what is trained, and not the code, the place or the layout."""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest

from tasks.sft import SFT
from tests.conftest import sums, write_rows
from tests.toys import tasks as toys
from trainer.data import identity
from trainer.data.cache_key import _STREAMED, FEATURES, source_key
from trainer.data.lengths import Report
from trainer.data.render import Renderer
from trainer.data.rows import Rows, cached_digest, tokenise

OLD_KEY = "0123456789abcdef" * 2
COUNTS = {"rows": 60, "tokens": 1740, "trained_tokens": 200}


def sft(path: Path, **changes: Any) -> SFT:
    return SFT(str(path), **toys.SFT | changes)


def built(tiny: Any, task: Any) -> Rows:
    return tokenise(task, "train", Renderer(tiny.tokenizer, task), 512, "raise", 1)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture(autouse=True)
def warn_again() -> None:
    identity._warn_unverified.cache_clear()


def table(rows: list[dict[str, Any]], batches: int = 1) -> Rows:
    """Rows as a table of some batches."""
    size = -(-len(rows) // batches)
    parts = [
        datasets.Dataset.from_list(rows[i : i + size], features=FEATURES)
        for i in range(0, len(rows), size)
    ]
    return Rows(datasets.concatenate_datasets(parts), Report())


ROWS = [
    {
        "ids": [5, 6, 7],
        "trained": [False, True, True],
        "label": -1,
        "index": 0,
        "where": "a:1",
        "weight": 1.0,
    },
    {"ids": [8], "trained": [False], "label": -1, "index": 1, "where": "a:2", "weight": 1.0},
    {
        "ids": [9, 10],
        "trained": [True, True],
        "label": -1,
        "index": 2,
        "where": "a:3",
        "weight": 1.0,
    },
]


def test_the_digest_follows_neither_batches_nor_places():
    elsewhere = [row | {"where": f"b:{i}", "index": i + 7} for i, row in enumerate(ROWS)]
    assert table(ROWS).digest == table(ROWS, 3).digest == table(elsewhere, 2).digest


@pytest.mark.parametrize(
    "change",
    [
        {0: {"ids": [5, 6, 8]}},
        {0: {"trained": [False, True, False]}},
        {1: {"label": 0}},
        {1: {"weight": 0.5}},
        {
            0: {"ids": [5, 6], "trained": [False, True]},
            1: {"ids": [7, 8], "trained": [True, False]},
        },  # the same, cut elsewhere
    ],
)
def test_the_digest_follows_tokens_trained_ones_labels_and_where_rows_end(change):
    others = [row | change.get(i, {}) for i, row in enumerate(ROWS)]
    assert table(others).digest != table(ROWS).digest
    assert table(ROWS[::-1]).digest != table(ROWS).digest


def test_other_source_text_of_the_code_makes_other_entries_with_the_same_identity(
    tiny, chats, own_cache, monkeypatch
):
    first = identity.of_rows(built(tiny, sft(chats)))
    source = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda part: source(part) + "# a comment\n")
    second = identity.of_rows(built(tiny, sft(chats)))
    assert len(list(own_cache.glob("*.json"))) == 2
    assert first == second
    assert first["rows"] == 60
    write_rows(chats, sums(60, seed=1))
    assert identity.of_rows(built(tiny, sft(chats)))["sha256"] != first["sha256"]


def test_a_stream_is_known_by_its_files_and_settings_and_not_by_code(tiny, chats, monkeypatch):
    def key(**changes: Any) -> str:
        task = sft(chats, **changes)
        return source_key(task, "train", Renderer(tiny.tokenizer, task), 64, "drop")

    first = key()
    source = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda part: source(part) + "# a comment\n")
    assert key() == first
    assert key(system="Add.") != first
    write_rows(chats, sums(60, seed=1))
    assert key() != first


def test_a_cache_entry_of_an_earlier_version_is_given_its_digest_once(tiny, chats, own_cache):
    rows = built(tiny, sft(chats))
    (file,) = own_cache.glob("*.json")
    stored = json.loads(file.read_text())
    assert stored.pop("content") == rows.digest
    file.write_text(json.dumps(stored))
    assert built(tiny, sft(chats)).digest == rows.digest
    assert json.loads(file.read_text()) == stored | {"content": rows.digest}


# What the run.yaml of an earlier version has: the key of the cache


def preflight(folder: Path, **splits: dict[str, int]) -> None:
    """Write what an earlier version recorded of its rows."""
    names = {"rows": "kept"}
    data_ = {
        split: {names.get(name, name): count for name, count in counts.items()}
        for split, counts in splits.items()
    }
    (folder / "preflight.json").write_text(json.dumps({"data": data_}))


def test_a_key_whose_entry_is_there_is_compared_by_digest(tiny, chats, own_cache, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    now = identity.of_rows(built(tiny, sft(chats)))
    (key,) = (file.stem for file in own_cache.glob("*.json"))
    preflight(tmp_path, train=COUNTS)  # which nobody needs then
    assert identity.changed(tmp_path, {"train": key}, {"train": now}) == []
    assert identity.changed(tmp_path, {"train": key}, {"train": now | {"sha256": "0" * 64}}) == [
        "train"
    ]
    assert not caplog.records
    (arrow,) = own_cache.rglob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:-9])
    assert cached_digest(key) is None


def test_a_key_without_an_entry_is_compared_by_counts_with_a_warning(own_cache, tmp_path, caplog):
    preflight(tmp_path, train=COUNTS)
    recorded = {"train": OLD_KEY, "eval": "f" * 32}
    current = {
        "train": {"sha256": "a" * 64} | COUNTS,
        "eval": {"sha256": "b" * 64} | dict.fromkeys(COUNTS, 0),
    }
    assert identity.changed(tmp_path, recorded, current) == []
    (record,) = caplog.records
    assert "the rows of train could not be verified by digest" in record.message
    assert "(60 rows, 1,740 tokens, 200 trained tokens)" in record.message
    for name in COUNTS:
        other = current | {"train": current["train"] | {name: COUNTS[name] + 1}}
        assert identity.changed(tmp_path, recorded, other) == ["train"]
    assert identity.changed(tmp_path, recorded, current | {"eval": current["train"]}) == ["eval"]


def test_a_key_of_which_nothing_else_is_known_is_taken_with_a_warning(own_cache, tmp_path, caplog):
    assert identity.changed(tmp_path, {"train": OLD_KEY}, {"train": {"source": "c" * 32}}) == []
    assert "No counts were recorded either" in caplog.text


@pytest.mark.parametrize(
    "recorded", ["../../secret", "", 7, None, ["a"], {}, {"sha256": 5}, {"source": "a" * 64}]
)
def test_what_no_version_recorded_is_another_identity(own_cache, tmp_path, recorded):
    preflight(tmp_path, train=COUNTS)
    assert identity.changed(
        tmp_path, {"train": recorded}, {"train": {"sha256": "a" * 64} | COUNTS}
    ) == ["train"]


def test_streams_of_older_runs_keep_their_identity():
    """Their columns are part of it, and had no weight."""
    assert _STREAMED == (
        "{'ids': List(Value('int32')), 'trained': List(Value('bool')), 'label': Value('int32'),"
        " 'index': Value('int64'), 'where': Value('string')}"
    )
