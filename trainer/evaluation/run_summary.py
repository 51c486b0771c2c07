"""The history of a run, read from run.yaml and metrics.jsonl of a folder that may be a
stranger's."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any

from trainer.storage import door, journal, run_folder
from trainer.storage.run_folder import FolderError, RunFolder

# They name and place a run; two runs that differ in nothing else are one experiment.
NAMES = ("name", "runs", "resume", "requeue", "max_requeues")

# what pages and tables show of run.yaml
_SHOWN = {
    "identity": {"precision?": str, "steps?": (int, NoneType), "choices": {"*": (str, NoneType)}},
    "config": {"base?": {"path?": (str, NoneType), "*": object}, "*": object},
    "starts": [{"versions?": {"*": (str, NoneType)}, "*": object}],
    "parent?": (dict, NoneType),
}


def record_of(folder: Path) -> dict[str, Any]:
    """Return the content of run.yaml.

    Raises:
        FolderError: it is no run folder, it holds what no run writes, or run.yaml is damaged.
    """
    place = RunFolder(folder)
    place.refuse_links()
    record = place.earlier()
    if record is None:
        raise FolderError(f"{folder} is no run folder: it has no run.yaml")
    if (fault := door.mismatch(record, _SHOWN)) is not None:
        raise FolderError(f"{place.file} is not a run's record: {fault}")
    return record


def is_number(value: Any) -> bool:
    """Return whether a value of the journal is a number."""
    return door.mismatch(value, door.NUMBER) is None


def points(rows: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return (step, number) of the journal's rows that have a number of this name."""
    return [(row["step"], row[key]) for row in rows if is_number(row.get(key))]


@dataclass(frozen=True)
class Summary:
    """One run. `record` is run.yaml, `settings` are its config, flat; `rows` are those of
    metrics.jsonl by kind."""

    folder: Path
    record: dict[str, Any]
    name: str
    choices: dict[str, Any]
    settings: dict[str, Any]
    seed: Any
    rows: dict[str, list[dict[str, Any]]]
    bytes: int | None

    def last(self, key: str) -> Any:
        """The newest number of this name in the rows of steps, None if there is none."""
        return self._last_of(self.rows["step"], key)

    def _last_of(self, rows: list[dict[str, Any]], key: str) -> Any:
        return next((row[key] for row in reversed(rows) if is_number(row.get(key))), None)

    @property
    def steps(self) -> int:
        """Steps that were logged."""
        return self.rows["step"][-1]["step"] if self.rows["step"] else 0

    @property
    def memory(self) -> float | None:
        """Peak of GPU memory in bytes, None on a CPU."""
        peaks = [row["memory_gb"] for row in self.rows["step"] if is_number(row.get("memory_gb"))]
        return max(peaks) * 1e9 if peaks else None

    @property
    def metrics(self) -> list[str]:
        """Names of the held-out numbers, in the order of the journal."""
        rows = self.rows["evaluation"]
        every = dict.fromkeys(name for row in rows for name in row)
        names = [name for name in every if name not in journal.NO_METRICS]
        return [name for name in names if any(is_number(row.get(name)) for row in rows)]

    @cached_property
    def best_row(self) -> dict[str, Any]:
        """The evaluation that is best by the run's own monitor, empty if there is none."""
        monitor = str(self.settings.get("callbacks.evaluation.monitor") or "loss")
        rows = [row for row in self.rows["evaluation"] if is_number(row.get(monitor))]
        sign = -1 if self.settings.get("callbacks.evaluation.mode") == "max" else 1
        return min(rows, key=lambda row: sign * row[monitor]) if rows else {}

    def first(self, metric: str) -> Any:
        """The held-out number before training, None if training began without."""
        rows = self.rows["evaluation"]
        value = rows[0].get(metric) if len(rows) > 1 else None
        return value if is_number(value) else None

    def final(self, metric: str) -> Any:
        """The newest held-out number of this name."""
        return self._last_of(self.rows["evaluation"], metric)

    def best(self, metric: str) -> Any:
        """The held-out number at the best step."""
        value = self.best_row.get(metric)
        return value if is_number(value) else None


def summary(folder: Path) -> Summary:
    """Read a run.

    Raises:
        FolderError: it is no run folder, or a stranger's that no command reads.
    """
    record = record_of(folder)
    run_folder.complete(record, folder / "run.yaml", warn=False)
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in journal.read(folder / "metrics.jsonl"):
        rows[row["kind"]].append(row)
    settings = dict(run_folder.flat(record["config"]))
    return Summary(
        folder,
        record,
        record["name"],
        record["identity"]["choices"],
        settings,
        settings.pop("seed", None),
        rows,
        _bytes(folder),
    )


def _bytes(folder: Path) -> int | None:
    """Bytes of the tensors that the run made, None before it has ended."""
    sizes = [
        file.stat().st_size
        for part in ("adapter", "drafter")
        for file in (folder / part).glob("*.safetensors")
    ]
    return sum(sizes) if sizes else None


def folders(place: Path) -> list[Path]:
    """The run folders that a name stands for: itself, or those in it, as of a sweep.

    Raises:
        FolderError: there are none.
    """
    if (place / "run.yaml").exists():
        return [place]
    runs = [file.parent for file in place.glob("*/run.yaml")]
    if not runs:
        raise FolderError(
            f"{place} is no run folder, and holds none: expected run.yaml in it or one folder below"
        )
    return sorted(runs, key=lambda run: [_digits(part) for part in re.split(r"(\d+)", run.name)])


def _digits(part: str) -> tuple[int, int, str]:
    return (0, int(part), "") if part.isdecimal() and len(part) < 19 else (1, 0, part)
