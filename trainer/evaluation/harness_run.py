"""lm-eval's benchmarks on the model of a run, and on its base."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapters.full import Full
from trainer.assembly.trained import Trained, load_trained
from trainer.config.errors import ConfigError
from trainer.decoding.merged import merged
from trainer.evaluation import harness, harness_table


@dataclass(frozen=True)
class Measured:
    """The scores of a run at a step, by model: base, adapted. `rows` are those of the journal;
    `differences` has the mean difference of each score, and its standard error."""

    folder: Path
    step: int
    scores: dict[str, harness.Scores]
    rows: dict[str, dict[str, Any]]

    @property
    def differences(self) -> dict[str, tuple[float, float]]:
        """Adapted minus base over the same rows; empty without the base."""
        if {"base", "adapted"} - {*self.scores}:
            return {}
        pairs = harness_table.paired(self.scores["base"].samples, self.scores["adapted"].samples)
        numbers = self.scores["adapted"].numbers
        return {name: pair for name, pair in pairs.items() if name in numbers}


def measure(run: str, settings: harness.Settings, compare: bool) -> Measured:
    """Evaluate the adapted model, and with `compare` the base first.

    Raises:
        ConfigError: lm-eval or a task is missing, or the run's model writes no text.
        Others: see load_trained.
    """
    tasks = harness.find(settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = load_trained(run, device)
    if trained.task.kind == "label":
        raise ConfigError(
            f"{trained.folder} classifies, and lm-eval asks models that write text. Use: graft"
            f" evaluate run={trained.folder}"
        )
    scores: dict[str, harness.Scores] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name in ["base", "adapted"] if compare else ["adapted"]:
        started = time.monotonic()
        with _as(name, trained, device) as model:
            scores[name] = harness.evaluate(model, trained.renderer, trained.stops, settings, tasks)
        seconds = time.monotonic() - started
        rows[name] = harness.row(name, settings, scores[name], seconds)
    return Measured(trained.folder, trained.step, scores, rows)


@contextlib.contextmanager
def _as(name: str, trained: Trained, device: torch.device) -> Any:
    """Yield the base, or the adapted model."""
    if name == "adapted":
        with merged(trained.model):
            yield trained.model
    elif isinstance(trained.adapter, Full):  # it has no base to switch back to
        dtype = next(trained.model.parameters()).dtype
        yield trained.base.load(dtype, None, device).eval()
    else:
        with trained.adapter.disabled(trained.model):
            yield trained.model
