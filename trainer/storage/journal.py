"""A run's own record of its numbers: one JSON object a line. Dashboards get copies, and nothing
depends on them."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

from trainer.storage import atomic

log = logging.getLogger(__name__)


class Journal:
    """Appends to metrics.jsonl and samples.jsonl. Rows are {kind, step, ...}; kinds are step,
    evaluation, average, adapter, penalty, density, cooldown, skipped, stopped."""

    def __init__(self, folder: Path, loggers: list[Any], writes: bool = True):
        self.metrics, self.samples, self.csv = (
            folder / "metrics.jsonl",
            folder / "samples.jsonl",
            folder / "metrics.csv",
        )
        self.loggers, self.writes = loggers, writes  # each a callbacks.dashboards.Dashboard
        self.failed: set[int] = set()  # dashboards whose first error was reported
        self.tokens: int | None = None  # processed up to the current step
        self.last: dict[str, Any] = {}  # the newest row of kind step

    def rewind(self, step: int, cooled: bool = True) -> None:
        """Remove the rows after `step`, which a resumed run writes again, and the rows that say
        that the run was stopped. -1 removes all rows. Without `cooled`, also remove the rows that
        say that a cooldown began."""
        removed = ('"kind": "stopped"',) if cooled else ('"kind": "stopped"', '"kind": "cooldown"')
        for path in (self.metrics, self.samples):
            if self.writes and path.exists():
                lines = [
                    line
                    for line in _lines(path)
                    if _step(line) <= step and not any(kind in line for kind in removed)
                ]
                atomic.write_text(path, "".join(f"{line}\n" for line in lines))

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append one row, and forward it to the dashboards."""
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
            temporary.open("w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a journal file. A last line that a kill cut off is skipped."""
    if not path.exists():
        return []
    rows = []
    for line in _lines(path):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _lines(path: Path) -> list[str]:
    # Not splitlines: an answer may hold U+2028, which JSON does not escape. A kill can cut a
    # character in two.
    return path.read_text("utf-8", errors="replace").split("\n")


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")
