"""The interface of dashboards, the names of their numbers, and an end that never fails."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Protocol

from trainer.assembly.build import instantiate
from trainer.config.secrets import redact

log = logging.getLogger(__name__)

AXES = ("global_step", "tokens")


class Dashboard(Protocol):
    """Holds a copy of the journal. Its methods may raise anything."""

    name: str

    def log(self, kind: str, step: int, tokens: int | None, values: dict[str, Any]) -> None:
        """Copy a row of the journal that was written after `tokens` processed tokens."""

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Copy generated answers."""

    def finish(self, error: BaseException | None) -> None:
        """End with the run. `error` is the exception that ended it, or None."""


class Dashboards:
    """The dashboards of a run, as a context: they end with it."""

    def __init__(self) -> None:
        self.all: list[Dashboard] = []

    def __enter__(self) -> Dashboards:
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        for dashboard in self.all:
            try:
                dashboard.finish(error)
            except Exception as fault:
                log.warning("%s: %s", dashboard.name, first_line(fault))
        self.all.clear()


def make_dashboards(config: dict[str, Any], folder: Path, record: dict[str, Any]) -> list[Any]:
    """Connect to the dashboards of a run, under its id."""
    start = record["starts"][-1] | {"number": len(record["starts"])}
    loggers = [instantiate(node) for node in config["logger"].values() if node is not None]
    dashboards = [
        logger(
            folder=folder,
            run_id=record["id"],
            name=config["name"],
            config=config,
            start=start,
        )
        for logger in loggers
    ]
    return [dashboard for dashboard in dashboards if dashboard is not None]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, without secrets."""
    return redact(str(error)).partition("\n")[0] or type(error).__name__


def numbers(kind: str, values: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a row of the journal, under names by which dashboards group them
    (docs/dashboard.md)."""
    if kind == "harness" and values.get("model") == "base":
        kind = "harness_base"  # a curve of its own: both models are measured at the same step
    return {
        f"{_prefix(kind, key)}/{key}": value
        for key, value in values.items()
        if isinstance(value, int | float) and key not in AXES
    }


def _prefix(kind: str, key: str) -> str:
    if key.startswith("offset") or key in ("accepted", "expected"):
        return {"step": "heads", "evaluation": "heads_eval"}.get(kind, f"heads_{kind}")
    if kind == "step" and key in ("tokens_per_s", "trained_per_s", "seconds", "memory_gb"):
        return "speed"
    names = {
        "step": "train",
        "evaluation": "eval",
        "average": "eval_average",
        "adapter": "mask",
        "penalty": "density",
    }
    return names.get(kind, kind)
