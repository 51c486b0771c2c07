"""The interface of dashboards, the names of their numbers, and an end that never fails."""

from __future__ import annotations

import logging
from typing import Any, Protocol

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


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, without secrets."""
    return redact(str(error)).partition("\n")[0] or type(error).__name__


def numbers(kind: str, values: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a row of the journal, under names by which dashboards group them
    (docs/dashboard.md)."""
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
