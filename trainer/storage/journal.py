"""A run's own record of its numbers: one JSON object a line. Dashboards get copies, and nothing
depends on them."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.config import files
from trainer.storage import atomic, door

log = logging.getLogger(__name__)

LARGEST = 2 << 30  # bytes of a file: seven million steps
SAMPLES = "samples.jsonl"
NO_METRICS = ("kind", "step", "seconds", "answers", "answer_seconds")  # of an evaluation's row
_ROW = {"kind": str, "step": int, "*": object}
_NUMBERS = ("loss", "lr", "tokens", "seconds", "tokens_per_s", "trained_per_s", "grad_norm")
_MEASURED = {f"{name}?": door.MAYBE_NUMBER for name in _NUMBERS}
_KINDS: dict[str, Any] = {
    "step": _MEASURED,
    "evaluation": _MEASURED,
    "average": _MEASURED,
    "harness": {
        "model": str,
        "settings?": str,
        "rows?": {"*": door.MAYBE_NUMBER},
        "seconds?": door.MAYBE_NUMBER,
    },
    "cooldown": {"steps": int, "reason": str, "level?": door.NUMBER},
    "stopped": {
        "reason": str,
        "steps?": door.MAYBE_NUMBER,
        "minutes?": door.MAYBE_NUMBER,
        "max_time?": door.MAYBE_NUMBER,
    },
}
_SAMPLE = {
    "step": int,
    "where?": str,
    "prompt?": str,
    "expected?": object,
    "answer?": str,
    "scores?": {"*": door.MAYBE_NUMBER},
}


class Journal:
    """Appends to metrics.jsonl and samples.jsonl. Rows are {kind, step, ...}; kinds are step,
    evaluation, harness, average, adapter, penalty, density, cooldown, skipped, memory, rollback,
    stopped."""

    def __init__(self, folder: Path, loggers: list[Any], writes: bool = True):
        self.metrics, self.samples, self.csv = (
            folder / "metrics.jsonl",
            folder / SAMPLES,
            folder / "metrics.csv",
        )
        self.loggers, self.writes = loggers, writes  # each a callbacks.dashboards.Dashboard
        self.failed: set[int] = set()  # dashboards whose first error was reported
        self.tokens: int | None = None  # processed up to the current step
        self.last: dict[str, Any] = {}  # the newest row of kind step
        # writes the rows of a step that wait for its numbers, so that rows stay in order
        self.before: Callable[[], None] | None = None

    def rewind(self, step: int, cooled: bool = True) -> None:
        """Remove the rows after `step`, which a resumed run writes again, and the rows that say
        that the run was stopped. -1 removes all rows. Without `cooled`, also remove the rows that
        say that a cooldown began."""
        removed = {"stopped"} if cooled else {"stopped", "cooldown"}
        for path in (self.metrics, self.samples):
            if self.writes and path.exists():
                self._rewind(path, step, removed if path == self.metrics else set())

    def _rewind(self, path: Path, step: int, removed: set[str]) -> None:
        try:
            lines, fault = _parsed(path), None
        except (OSError, ValueError) as error:  # too large, or no file
            lines, fault = [], door.reason(error)
        if damaged := _damaged(lines):
            fault = f"line {damaged[0].number} is no row of it"
        if fault is not None:
            door.set_aside(path, f"{fault}; its whole lines are kept" if lines else fault)
        whole_lines = (
            line.text
            for line in lines
            if line.row is not None
            and line.row["step"] <= step
            and line.row.get("kind") not in removed
        )
        atomic.write_text(path, "".join(f"{text}\n" for text in whole_lines))

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append one row, and forward it to the dashboards."""
        if self.before is not None:
            self.before()
        if kind == "step":
            self.last = values
        if not self.writes:
            return
        _append(self.metrics, {"kind": kind, "step": step, **values})
        self._forward_to_dashboards("log", kind, step, self.tokens, values)

    def write_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Append generated answers, each with its prompt, the expected answer and its scores."""
        for sample in samples if self.writes else []:
            _append(self.samples, {"step": step, **sample})
        if self.writes and samples:
            self._forward_to_dashboards("log_samples", step, samples)

    def _forward_to_dashboards(self, method: str, *arguments: Any) -> None:
        # A dashboard's server may be down: the first error is reported, and the run continues.
        for index, logger in enumerate(self.loggers):
            try:
                getattr(logger, method)(*arguments)
            except Exception as error:
                if index not in self.failed:
                    self.failed.add(index)
                    first_line = str(error).partition("\n")[0] or type(error).__name__
                    log.warning(
                        "%s: %s. The run continues; %s holds everything that it logs",
                        logger.name,
                        first_line.rstrip("."),
                        self.metrics,
                    )

    def rows(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Return the rows written so far, all or those of one kind."""
        return [row for row in read(self.metrics) if kind is None or row["kind"] == kind]

    def write_csv(self) -> None:
        """Write metrics.csv from metrics.jsonl, with a column for each name that occurs."""
        if not self.writes:
            return
        rows = self.rows()
        names = list(dict.fromkeys(name for row in rows for name in row))
        with (
            atomic.file(self.csv) as temporary,
            temporary.open("w", encoding="utf-8", errors="replace", newline="") as file,
        ):
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a journal file, in the shape of their kind. A last line that a kill cut
    off is skipped; other damaged lines are left out with a warning."""
    return [row for _, row in read_lines(path)]


def read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the rows of a journal file as `read` does, each with its line of text."""
    if not path.exists():
        return []
    try:
        lines = _parsed(path)
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s) and is left out", path, door.reason(error))
        return []
    if damaged := _damaged(lines):
        log.warning(
            "%s: %d lines are damaged and left out, the first is line %d",
            path,
            len(damaged),
            damaged[0].number,
        )
    return [(line.text, line.row) for line in lines if line.row is not None]


def _damaged(lines: list[_Line]) -> list[_Line]:
    return [line for line in lines if line.row is None and not line.cut]


@dataclass(frozen=True)
class _Line:
    number: int  # from 1, of those that are not empty
    text: str
    row: dict[str, Any] | None  # None: it is damaged
    cut: bool = False  # whether a kill has cut it off


def _parsed(path: Path) -> list[_Line]:
    """Parse the lines of a journal file that are not empty.

    Raises:
        OSError, ValueError: the file cannot be read.
    """
    # Not splitlines: an answer may hold U+2028, which JSON does not escape. A kill can cut a
    # character in two.
    content = files.read_text(path, LARGEST, errors="replace")
    lines = []
    for number, text in enumerate(filter(str.strip, content.split("\n")), 1):
        row, cut = None, False
        try:
            row = door.parse(text)
        except ValueError as error:
            cut = isinstance(error, json.JSONDecodeError) and text.startswith("{")
        if row is not None and _fault(row, path.name == SAMPLES) is not None:
            row = None
        lines.append(_Line(number, text, row, cut))
    whole = content.endswith("\n")
    return [replace(line, cut=line.cut and line is lines[-1] and not whole) for line in lines]


def _fault(row: Any, sample: bool) -> str | None:
    if sample:
        return door.mismatch(row, _SAMPLE)
    return door.mismatch(row, _ROW) or door.mismatch(row, _KINDS.get(row["kind"], {}))


def _append(path: Path, row: dict[str, Any]) -> None:
    with files.append(path) as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
