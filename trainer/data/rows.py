"""Tokenised rows: made once from a task's examples, cached, counted, and packed if asked."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
import multiprocessing
import os
import re
import shutil
import sys
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.ipc
import tokenizers
import transformers
from filelock import FileLock, Timeout

from tasks import conversation, reading, wheel
from tasks import task as tasks_task
from tasks.reading import Bad, DataError
from tasks.task import Conversation, Example
from trainer.data import render
from trainer.data.render import Refused, Renderer, Tokens

log = logging.getLogger(__name__)

SHOWN = 20  # broken rows that an error or a report lists
WRITTEN = 1000  # rows that are written at once
WAIT = 30  # seconds between two messages of a process that waits for another one's rows
_FEATURES = datasets.Features(
    {
        "ids": datasets.List(datasets.Value("int32")),
        "trained": datasets.List(datasets.Value("bool")),
        "label": datasets.Value("int32"),
        "index": datasets.Value("int64"),  # of the example in its split
        "where": datasets.Value("string"),
    }
)


@dataclass
class Report:
    """What became of a split's rows. Nothing is left out without being counted here."""

    rows: int = 0
    kept: int = 0
    dropped: int = 0  # longer than max_length, with overlong=drop
    truncated: int = 0  # cut to max_length, with overlong=truncate
    answers_lost: int = 0  # cut so that no trained token was left, and dropped for it
    tokens_cut: int = 0
    skipped: int = 0  # broken, with on_bad=skip
    special_text: int = 0  # rows whose messages hold the text of a special token
    ends_trained: int = 0  # rows whose last trained token ends the answer
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)  # the first broken rows: where, why

    def summary(self) -> str:
        """One line for people."""
        parts = [f"{self.kept} of {self.rows} rows kept"]
        for count, text in (
            (self.dropped, "longer than max_length, dropped"),
            (self.truncated, f"truncated ({self.tokens_cut} tokens)"),
            (self.answers_lost, "lost their answer to truncation, dropped"),
            (self.skipped, "broken, skipped"),
        ):
            if count:
                parts.append(f"{count} {text}")
        share = self.trained_tokens / self.tokens if self.tokens else 0.0
        return "; ".join(parts) + f"; {self.tokens:,} tokens, {share:.0%} of them trained"


class Rows:
    """The tokenised rows of one split, memory-mapped."""

    def __init__(self, table: datasets.Dataset, report: Report):
        self.table, self.report = table.with_format("numpy"), report

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Tokens:
        row = self.table[int(index)]
        return Tokens(
            np.asarray(row["ids"]).tolist(), np.asarray(row["trained"]).tolist(), int(row["label"])
        )

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return _list_lengths(self.table, "ids")

    @cached_property
    def trained(self) -> np.ndarray:
        """Trained tokens of each row that a model can be asked for: the first token of a row
        follows nothing."""
        counts = []
        for flags, starts in _flat(self.table, "trained"):
            firsts = starts[:-1][np.diff(starts) > 0]
            before = np.concatenate([[0], np.cumsum(flags)])
            asked = before[starts[1:]] - before[starts[:-1]]
            asked[np.diff(starts) > 0] -= flags[firsts]
            counts.append(asked)
        return np.concatenate(counts) if counts else np.zeros(0, np.int64)

    def counts(self, vocabulary: int) -> np.ndarray:
        """How often each of the vocabulary's tokens is trained, (V,) int64."""
        found = np.zeros(vocabulary, np.int64)
        for (ids, starts), (flags, _) in zip(
            _flat(self.table, "ids"), _flat(self.table, "trained"), strict=True
        ):
            asked = flags.astype(bool)
            asked[starts[:-1][np.diff(starts) > 0]] = False
            found += np.bincount(ids[asked], minlength=vocabulary)
        return found

    def examples(self) -> list[int]:
        """For each row, which of the split's examples it was made from."""
        return self.table.data.column("index").to_pylist()

    def where(self, index: int) -> str:
        """File and line of a row, as they were when it was tokenised."""
        return self.table[int(index)]["where"]

    def digests(self) -> Iterator[bytes]:
        """A digest of each row's tokens and label, to find duplicates."""
        for (ids, starts), labels in zip(
            _flat(self.table, "ids"), self.table.data.column("label").chunks, strict=True
        ):
            for start, end, label in zip(
                starts[:-1].tolist(), starts[1:].tolist(), labels.to_pylist(), strict=True
            ):
                yield hashlib.blake2b(
                    ids[start:end].tobytes() + str(label).encode(), digest_size=16
                ).digest()


def _flat(table: datasets.Dataset, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each chunk of a column of lists, its values (m,) one list after another, and where each
    of n lists starts, (n + 1,)."""
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
    """All rows of a split as tokens, from the cache where nothing has changed that they depend on.

    Of several processes that share the cache one makes it, and the others wait at its lock, which
    goes with its process: for as long as it takes, and with no message of torch's in between that
    could be late.

    Raises:
        DataError: a broken row (with on_bad=raise) or an over-long one (with overlong=raise), or no
        row is left.
    """
    # nothing is held out, and datasets cannot write a table without rows
    if next(iter(task.examples(split)), None) is None:
        if split == "train":
            raise DataError("the training data has no row")
        return Rows(
            datasets.Dataset.from_dict({name: [] for name in _FEATURES}, features=_FEATURES),
            Report(),
        )
    key = cache_key(task, split, renderer, max_length, overlong)
    folder = wheel.cache_dir() / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    report_file = folder / f"{key}.json"
    error_file = folder / f"{key}.error"
    before = _text(error_file)
    with _locked(folder / f"{key}.lock", split) as waited:
        if waited and (told := _text(error_file)) not in ("", before):
            raise DataError(told.partition("\n")[2])  # of the process that was waited for
        if report_file.exists():
            with contextlib.suppress(Exception):  # a damaged cache is made again
                made = json.loads(report_file.read_text())
                report, table = Report(**made["report"]), _table(key, folder)
                if len(table) == report.kept and _digest(table) == made["sha256"]:
                    return Rows(table, report)
        report = Report()
        report_file.unlink(missing_ok=True)
        shutil.rmtree(folder / key, ignore_errors=True)
        try:
            _write(
                key, folder, _kept(task, split, renderer, max_length, overlong, processes, report)
            )
        except DataError as error:
            error_file.write_text(f"{uuid.uuid4()}\n{error}")
            raise
        table = _table(key, folder)
        temporary = report_file.with_suffix(".tmp")
        temporary.write_text(json.dumps({"report": asdict(report), "sha256": _digest(table)}))
        os.replace(temporary, report_file)
        error_file.unlink(missing_ok=True)
    return Rows(table, report)


def _digest(table: datasets.Dataset) -> str:
    """A sha256 of a table's files: a bit that turns on the disk would train other tokens without a
    word."""
    return " ".join(wheel.sha256(Path(file["filename"])) for file in table.cache_files)


def _text(file: Path) -> str:
    return file.read_text() if file.exists() else ""


@contextlib.contextmanager
def _locked(path: Path, split: str) -> Iterator[bool]:
    """Hold a lock; gives whether another process had it before."""
    lock, waited = FileLock(path), 0
    while True:
        try:
            lock.acquire(timeout=WAIT if waited else 0)
            break
        except Timeout:
            if waited:
                log.info(
                    "%s: another process has been tokenising the rows for %d s; waiting for it",
                    split,
                    waited * WAIT,
                )
            waited += 1
    try:
        yield waited > 0
    finally:
        lock.release()


def _write(key: str, folder: Path, rows: Iterator[dict[str, Any]]) -> None:
    """As datasets would; its own writer looks at each token of each row, which takes as long as
    rendering them."""
    (folder / key).mkdir()
    with pyarrow.ipc.new_stream(folder / key / "rows.arrow", _FEATURES.arrow_schema) as stream:
        for chunk in _chunks(rows, WRITTEN):
            stream.write_batch(pyarrow.RecordBatch.from_pylist(chunk, _FEATURES.arrow_schema))


def _table(key: str, folder: Path) -> datasets.Dataset:
    return datasets.Dataset.from_file(str(folder / key / "rows.arrow"))


def cache_key(task: Any, split: str, renderer: Renderer, max_length: int, overlong: str) -> str:
    """A digest of everything that the tokenised rows depend on: data, template, tokenizer, lengths
    and code."""
    code = [inspect.getsource(part) for part in (render, reading, conversation, tasks_task, fit)]
    code.append(inspect.getsource(sys.modules[type(task).__module__]))
    tokenizer = renderer.tokenizer
    backend = (
        tokenizer.backend_tokenizer.to_str()
        if getattr(tokenizer, "is_fast", False)
        else json.dumps(tokenizer.get_vocab())
    )
    parts = [
        *code,
        str(_FEATURES),
        backend,
        json.dumps(tokenizer.special_tokens_map, default=str),
        json.dumps(renderer.template),
        renderer.train_on,
        task.fingerprint(split),
        task.on_bad,
        max_length,
        overlong,
        tokenizers.__version__,
        transformers.__version__,
    ]
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:32]


def _kept(
    task: Any,
    split: str,
    renderer: Renderer,
    max_length: int,
    overlong: str,
    processes: int,
    report: Report,
) -> Iterator[dict[str, Any]]:
    for index, (where, outcome) in enumerate(rendered(task.examples(split), renderer, processes)):
        report.rows += 1
        row = take(where, outcome, renderer, max_length, overlong, task.on_bad, report)
        if row is not None:
            yield {
                "ids": row.ids,
                "trained": row.trained,
                "label": row.label,
                "index": index,
                "where": where,
            }
    if report.bad and task.on_bad == "raise":
        raise DataError(_listing(report))
    if report.rows and not report.kept:
        raise DataError(f"no row of {split} is left: {report.summary()}")


def take(
    where: str,
    outcome: Tokens | str,
    renderer: Renderer,
    max_length: int,
    overlong: str,
    on_bad: str,
    report: Report,
) -> Tokens | None:
    """Count one row, and give it back if it is kept, cut to length.

    Raises:
        DataError: with overlong=raise, or at the SHOWN-th broken row with on_bad=raise.
    """
    if isinstance(outcome, str):
        if len(report.bad) < SHOWN:
            report.bad.append((where, outcome))
        report.skipped += 1
        if on_bad == "raise" and report.skipped >= SHOWN:
            raise DataError(_listing(report))
        return None
    row = fit(outcome, max_length, overlong, renderer.kind == "label", where, report)
    if row is None:
        return None
    report.kept += 1
    report.tokens += len(row.ids)
    report.trained_tokens += sum(row.trained)
    report.longest = max(report.longest, len(row.ids))
    last = next((i for i in range(len(row.ids) - 1, -1, -1) if row.trained[i]), None)
    report.ends_trained += last is not None and row.ids[last] in renderer.ends
    return row


def fit(
    row: Tokens, max_length: int, overlong: str, labelled: bool, where: str, report: Report
) -> Tokens | None:
    """A row no longer than max_length, or None where it is dropped.

    Raises:
        DataError: it is longer, and overlong=raise.
    """
    if len(row.ids) <= max_length:
        return row
    if overlong == "raise":
        raise DataError(
            f"{where}: {len(row.ids)} tokens, more than max_length={max_length}. Set overlong=drop"
            " or truncate, or a larger max_length"
        )
    if overlong == "drop":
        report.dropped += 1
        return None
    cut = Tokens(row.ids[:max_length], row.trained[:max_length], row.label)
    if any(row.trained[1:]) and not any(cut.trained[1:]):
        report.answers_lost += 1
        return None
    report.truncated += 1
    report.tokens_cut += len(row.ids) - max_length
    return cut


def _listing(report: Report) -> str:
    lines = [f"{where}: {reason}" for where, reason in report.bad[:5]]
    more = report.skipped - len(lines)
    return "\n".join(
        [
            *lines,
            *([f"and {more} more broken rows"] if more > 0 else []),
            "Mend them, or leave them out with task.on_bad=skip",
        ]
    )


# A worker process keeps its renderer between chunks; pickling it with each of them would cost more
# than tokenising.
_renderer: Renderer | None = None


def _start_worker(renderer: Renderer) -> None:
    global _renderer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _renderer = renderer


def _render_chunk(chunk: list[Example | Bad]) -> list[tuple[str, Tokens | str]]:
    assert _renderer is not None
    return [render_one(example, _renderer) for example in chunk]


def render_one(example: Example | Bad, renderer: Renderer) -> tuple[str, Tokens | str]:
    """(where, Tokens), or (where, the reason why the row cannot be used)."""
    if isinstance(example, Bad):
        return example.where, example.reason
    try:
        row = renderer(example)
    except Refused as refusal:
        return example.where, str(refusal)
    if not row.ids:
        return example.where, "it has no tokens"
    if renderer.kind != "label" and not any(row.trained[1:]):
        return example.where, "it has no trained token"
    return example.where, row


def rendered(
    examples: Iterable[Example | Bad], renderer: Renderer, processes: int
) -> Iterator[tuple[str, Tokens | str]]:
    """`render_one` over examples, in their order, in several processes if asked."""
    if processes <= 1:
        for example in examples:
            yield render_one(example, renderer)
        return
    # Not multiprocessing.Pool: it waits for ever for the share of a process that was killed.
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), _start_worker, (renderer,)
    )
    shares: deque[Future[list[tuple[str, Tokens | str]]]] = deque()
    try:
        for chunk in _chunks(examples, 256):
            shares.append(pool.submit(_render_chunk, chunk))
            if len(shares) > 2 * processes:
                yield from shares.popleft().result()
        while shares:
            yield from shares.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            f"one of the {processes} processes that tokenise the rows was ended from outside, most"
            " likely for want of memory: set tokenise_processes=1, or give the job more memory"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def special_text(examples: Iterable[Example | Bad], tokenizer: Any) -> int:
    """Conversations whose messages hold the text of a special token, which would be read as that
    token."""
    pattern = re.compile(
        "|".join(re.escape(token) for token in tokenizer.all_special_tokens if token.strip())
        or "(?!)"
    )
    return sum(
        isinstance(example, Conversation)
        and any(pattern.search(message["content"]) for message in example.messages)
        for example in examples
    )
