"""The run's own record of numbers: one JSON object a line, copied to dashboards, never dependent on
them."""

from __future__ import annotations

import csv
import json
import logging
import os
from pathlib import Path
from typing import Any

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
        self.loggers, self.writes = loggers, writes  # each a callbacks.tracking.Dashboard
        self.failed: set[int] = set()  # dashboards whose first fault was told
        self.tokens: int | None = None  # processed until the step at hand
        self.last: dict[str, Any] = {}  # the newest row of kind step

    def rewind(self, step: int, cooled: bool = True) -> None:
        """Forget what came after `step`, and that the run was stopped: it goes on from there and
        writes it again. -1 forgets all; without `cooled` also that a cooldown began at `step`."""
        for path in (self.metrics, self.samples):
            if self.writes and path.exists():
                forgotten = (
                    ('"kind": "stopped"',)
                    if cooled
                    else ('"kind": "stopped"', '"kind": "cooldown"')
                )
                kept = [
                    line
                    for line in _lines(path)
                    if _step(line) <= step and not any(kind in line for kind in forgotten)
                ]
                temporary = path.with_name(path.name + ".tmp")
                temporary.write_text("".join(f"{line}\n" for line in kept), "utf-8")
                os.replace(temporary, path)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One row, of which the dashboards are told."""
        if kind == "step":
            self.last = values
        if not self.writes:
            return
        _append(self.metrics, {"kind": kind, "step": step, **values})
        self._tell("log", kind, step, self.tokens, values)

    def write_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Generated answers, each with its prompt, what was expected and its scores."""
        for sample in samples if self.writes else []:
            _append(self.samples, {"step": step, **sample})
        if self.writes and samples:
            self._tell("log_samples", step, samples)

    def _tell(self, what: str, *of: Any) -> None:
        for index, logger in enumerate(self.loggers):
            try:
                getattr(logger, what)(*of)
            except Exception as error:
                if index not in self.failed:
                    self.failed.add(index)
                    first = str(error).partition("\n")[0] or type(error).__name__
                    log.warning(
                        "%s: %s. The run goes on; %s holds all that it logs",
                        logger.name,
                        first.rstrip("."),
                        self.metrics,
                    )

    def rows(self, kind: str | None = None) -> list[dict[str, Any]]:
        """What was written so far."""
        return [row for row in read(self.metrics) if kind is None or row["kind"] == kind]

    def write_csv(self) -> None:
        """metrics.csv anew from metrics.jsonl: a column for each name that occurs."""
        if not self.writes:
            return
        rows = self.rows()
        names = list(dict.fromkeys(name for row in rows for name in row))
        temporary = self.csv.with_name(self.csv.name + ".tmp")
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.csv)


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a journal file; a last line cut off by a kill is passed over."""
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
    # Not splitlines: an answer may hold U+2028 and its like, which JSON leaves as they are. A kill
    # can cut a character in two.
    return path.read_text("utf-8", errors="replace").split("\n")


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")
