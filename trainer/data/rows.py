"""Tokenised rows: made once from a task's examples, cached and counted."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.ipc

from tasks import wheel
from tasks.reading import DataError
from trainer.data.cache_key import cache_key, features
from trainer.data.lengths import Report, listing, take
from trainer.data.render import Renderer, Tokens
from trainer.data.rendering import chunks, rendered
from trainer.storage import atomic
from trainer.storage.locks import locked
from trainer.storage.progress import current

WRITTEN = 1000  # rows that are written at a time


class Rows:
    """The tokenised rows of one split, memory-mapped. `digest` is that of their content, if it is
    known already."""

    def __init__(self, table: datasets.Dataset, report: Report, digest: str | None = None):
        self.table, self.report, self._digest = table.with_format("numpy"), report, digest

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Tokens:
        row = self.table[int(index)]
        values = np.asarray(row["values"]).tolist() if "values" in row else None
        return Tokens(
            np.asarray(row["ids"]).tolist(),
            np.asarray(row["trained"]).tolist(),
            int(row["label"]),
            float(row.get("weight", 1.0)),
            values,
            np.asarray(row["types"]).tolist() if "types" in row else None,
        )

    @cached_property
    def weights(self) -> np.ndarray | None:
        """The weight of each row, (rows,) float64; None if all are 1."""
        if "weight" not in self.table.column_names:  # of an earlier version
            return None
        weights = self.table.data.column("weight").to_numpy()
        return None if (weights == 1.0).all() else weights

    @cached_property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each row."""
        return _list_lengths(self.table, "ids")

    @cached_property
    def trained(self) -> np.ndarray:
        """The number of trained tokens of each row. The first token of a row does not count, since
        nothing predicts it."""
        counts = []
        for flags, starts in _flat(self.table, "trained"):
            firsts = starts[:-1][np.diff(starts) > 0]
            before = np.concatenate([[0], np.cumsum(flags)])
            count = before[starts[1:]] - before[starts[:-1]]
            count[np.diff(starts) > 0] -= flags[firsts]
            counts.append(count)
        return np.concatenate(counts) if counts else np.zeros(0, np.int64)

    @cached_property
    def prompts(self) -> np.ndarray:
        """The number of tokens before the first trained one of each row, whose first token does not
        count; all of them in a row without one."""
        counts = []
        for flags, starts in _flat(self.table, "trained"):
            trained = flags.astype(bool)
            trained[starts[:-1][np.diff(starts) > 0]] = False
            places = np.append(np.flatnonzero(trained), len(trained))
            first = places[np.searchsorted(places, starts[:-1])]
            counts.append(np.minimum(first, starts[1:]) - starts[:-1])
        return np.concatenate(counts) if counts else np.zeros(0, np.int64)

    def counts(self, vocabulary: int) -> np.ndarray:
        """Return how often each token of the vocabulary is trained, (V,) int64."""
        total = np.zeros(vocabulary, np.int64)
        for (ids, starts), (flags, _) in zip(
            _flat(self.table, "ids"), _flat(self.table, "trained"), strict=True
        ):
            trained = flags.astype(bool)
            trained[starts[:-1][np.diff(starts) > 0]] = False
            total += np.bincount(ids[trained], minlength=vocabulary)
        return total

    def tokens(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield, for each chunk of rows, their ids (m,), whether each is trained (m,), and the
        starts of the n rows (n + 1,)."""
        for (ids, starts), (trained, _) in zip(
            _flat(self.table, "ids"), _flat(self.table, "trained"), strict=True
        ):
            yield ids, trained, starts

    def examples(self) -> list[int]:
        """Return, for each row, the number of the example that it was made from."""
        return self.table.data.column("index").to_pylist()

    def where(self, index: int) -> str:
        """Return the file and line of a row, as they were when it was tokenised."""
        return self.table[int(index)]["where"]

    @cached_property
    def digest(self) -> str:
        """The sha256 of what is trained: tokens, which of them are trained, and labels of all rows
        in their order.

        The digest of the table's file would also follow where the data is stored and which version
        of a library wrote the file."""
        if self._digest is not None:
            return self._digest
        lengths, tokens, flags, labels = (hashlib.sha256() for _ in range(4))
        columns = zip(_flat(self.table, "ids"), _flat(self.table, "trained"), strict=True)
        for (ids, starts), (trained, _) in columns:
            lengths.update(np.diff(starts).astype("<i8").tobytes())
            tokens.update(ids.astype("<i4").tobytes())
            flags.update(trained.astype("u1").tobytes())
        for chunk in self.table.data.column("label").chunks:
            labels.update(chunk.to_numpy().astype("<i4").tobytes())
        if "values" in self.table.column_names:
            for values, starts in _flat(self.table, "values"):
                labels.update(np.diff(starts).astype("<i8").tobytes())
                labels.update(values.astype("<f4").tobytes())
        if "types" in self.table.column_names:
            for types, starts in _flat(self.table, "types"):
                labels.update(np.diff(starts).astype("<i8").tobytes())
                labels.update(types.astype("<i4").tobytes())
        parts = [lengths, tokens, flags, labels]
        if self.weights is not None:
            parts.append(hashlib.sha256(self.weights.astype("<f8").tobytes()))
        return hashlib.sha256(b"".join(part.digest() for part in parts)).hexdigest()

    def digests(self) -> Iterator[bytes]:
        """Yield a digest of each row's tokens and label, to find duplicates."""
        name = "values" if "values" in self.table.column_names else "label"
        for (ids, starts), labels in zip(
            _flat(self.table, "ids"), self.table.data.column(name).chunks, strict=True
        ):
            for start, end, label in zip(
                starts[:-1].tolist(), starts[1:].tolist(), labels.to_pylist(), strict=True
            ):
                yield hashlib.blake2b(
                    ids[start:end].tobytes() + str(label).encode(), digest_size=16
                ).digest()


def _flat(table: datasets.Dataset, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield, for each chunk of a column of lists, its values (m,), one list after another, and the
    starts of its n lists, (n + 1,)."""
    for chunk in table.data.column(name).chunks:
        starts = chunk.offsets.to_numpy()
        yield chunk.flatten().to_numpy(zero_copy_only=False), starts - starts[0]


def _list_lengths(table: datasets.Dataset, name: str) -> np.ndarray:
    import pyarrow.compute

    return np.asarray(
        pyarrow.compute.list_value_length(table.data.column(name)).to_numpy(), dtype=np.int64
    )


def tokenise(
    task: Any, split: str, renderer: Renderer, max_length: int, overlong: str, processes: int
) -> Rows:
    """Return all rows of a split as tokens, from the cache if nothing has changed that they depend
    on.

    Of several processes that share the cache, one makes the rows and the others wait for its lock
    as long as it takes (trainer.storage.locks).

    Raises:
        DataError: a row is broken and on_bad=raise, a row is too long and overlong=raise, or no row
            is left.
    """
    # A split may have no rows (nothing is held out), and datasets cannot write an empty table.
    if next(iter(task.examples(split)), None) is None:
        if split == "train":
            raise DataError("the training data has no row: see task.path and task.limit")
        columns = features(task)
        empty = datasets.Dataset.from_dict({name: [] for name in columns}, features=columns)
        return Rows(empty, Report())
    key = cache_key(task, split, renderer, max_length, overlong)
    folder = wheel.cache_dir() / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    report_file = folder / f"{key}.json"
    error_file = folder / f"{key}.error"
    before = _text(error_file)
    with locked(folder / f"{key}.lock", f"the rows of {split}") as waited:
        # The process that held the lock may have failed: its error is ours.
        if waited and (error_text := _text(error_file)) not in ("", before):
            raise DataError(error_text.partition("\n")[2])
        if report_file.exists():
            with contextlib.suppress(Exception):  # a damaged entry is made again
                entry = json.loads(report_file.read_text())
                report, table = Report(**entry["report"]), _table(key, folder)
                if len(table) == report.kept and _digest(table) == entry["sha256"]:
                    rows = Rows(table, report, entry.get("content"))
                    if "content" not in entry:  # an earlier version did not store it
                        _describe(rows, report_file)
                    return rows
        report = Report()
        report_file.unlink(missing_ok=True)
        shutil.rmtree(folder / key, ignore_errors=True)
        try:
            rows_read = _kept(task, split, renderer, max_length, overlong, processes, report)
            _write(key, folder, features(task).arrow_schema, rows_read)
        except DataError as error:
            atomic.write_text(error_file, f"{uuid.uuid4()}\n{error}")
            raise
        rows = Rows(_table(key, folder), report)
        _describe(rows, report_file)
        error_file.unlink(missing_ok=True)
    return rows


def cached_digest(key: str) -> str | None:
    """Return the digest of the rows that the cache holds under a key, or None if it holds none or
    they are damaged."""
    folder = wheel.cache_dir() / "tokens"
    try:
        entry, table = json.loads((folder / f"{key}.json").read_text()), _table(key, folder)
        if _digest(table) != entry["sha256"]:
            return None
        return Rows(table, Report(**entry["report"])).digest
    except Exception:  # a missing or damaged cache, whatever the reason
        return None


def _describe(rows: Rows, file: Path) -> None:
    """Write counts and digests of cached rows. An entry without this file is incomplete."""
    entry = {
        "report": asdict(rows.report),
        "sha256": _digest(rows.table),
        "content": rows.digest,
    }
    atomic.write_text(file, json.dumps(entry))


def _digest(table: datasets.Dataset) -> str:
    """Return the sha256 of a table's files. Without it, a bit that flips on the disk would silently
    change the trained tokens."""
    return " ".join(wheel.sha256(Path(file["filename"])) for file in table.cache_files)


def _text(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def _write(key: str, folder: Path, schema: pyarrow.Schema, rows: Iterator[dict[str, Any]]) -> None:
    """Write rows as datasets does. Its own writer inspects each token of each row, which takes as
    long as rendering them."""
    (folder / key).mkdir()
    with pyarrow.ipc.new_stream(folder / key / "rows.arrow", schema) as stream:
        for chunk in chunks(rows, WRITTEN):
            stream.write_batch(pyarrow.RecordBatch.from_pylist(chunk, schema))


def _table(key: str, folder: Path) -> datasets.Dataset:
    return datasets.Dataset.from_file(str(folder / key / "rows.arrow"))


def _kept(
    task: Any,
    split: str,
    renderer: Renderer,
    max_length: int,
    overlong: str,
    processes: int,
    report: Report,
) -> Iterator[dict[str, Any]]:
    progress = current()
    for index, (where, outcome) in enumerate(rendered(task.examples(split), renderer, processes)):
        report.rows += 1
        if progress is not None:
            progress.advance()
        for row in take(where, outcome, renderer, max_length, overlong, task.on_bad, report):
            yield {
                "ids": row.ids,
                "trained": row.trained,
                "label": row.label,
                **({} if row.values is None else {"values": row.values}),
                **({} if row.types is None else {"types": row.types}),
                "index": index,
                "where": where,
                "weight": row.weight,
            }
    if report.bad and task.on_bad == "raise":
        raise DataError(listing(report))
    if report.rows and not report.kept:
        raise DataError(f"no row of {split} is left: {report.summary()}")
