"""Benchmarks of lm-eval (EleutherAI's evaluation harness) on a model in memory.

lm-eval asks, grades and computes the standard errors. The model is the one of the run, with its
adapter un-merged, as it was trained. https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partialmethod
from typing import Any
from unittest import mock

from torch import nn

from trainer.config.errors import ConfigError
from trainer.data.render import Renderer
from trainer.data.stops import Stops
from trainer.evaluation.harness_table import STDERR
from trainer.storage.progress import Progress
from trainer.training.out_of_memory import out_of_memory

KIND = "harness"  # of a row of the journal

INSTALL = "pip install 'lm-eval>=0.4.13,<0.4.14'"
RESAMPLES = 1000  # of a bootstrap, where a standard error has no formula


@dataclass(frozen=True)
class Settings:
    """The questions. `limit` is rows of each task, below 1 a share; None all."""

    tasks: tuple[str, ...]
    include: str | None = None  # a folder of tasks
    limit: float | None = None
    num_fewshot: int | None = None  # None: what each task says
    chat: bool = False  # whether prompts are written with the run's chat template
    batch_size: int = 16

    @property
    def text(self) -> str:
        """The settings that change the numbers, in words."""
        shots = "as each task says" if self.num_fewshot is None else f"{self.num_fewshot}-shot"
        limit = self.limit
        some = "all rows"
        if limit is not None:
            some = f"{limit:.0%} of the rows" if limit < 1 else f"the first {limit:.0f} rows"
        return f"{shots}, {some}, {'chat template' if self.chat else 'plain prompts'}"


@dataclass(frozen=True)
class Tasks:
    """Tasks by name, and the index that has them."""

    names: list[str]
    manager: Any


@dataclass(frozen=True)
class Scores:
    """Numbers of a model. `numbers` has TASK/METRIC and, where lm-eval has one, its standard error
    as TASK/METRIC/stderr; `rows` counts those of each task; `samples` has what lm-eval keeps of
    each row, by task."""

    numbers: dict[str, float]
    rows: dict[str, int]
    samples: dict[str, list[dict[str, Any]]]


class Interrupted(Exception):
    """A signal to stop came between two batches."""


def missing(what: str) -> str | None:
    """Return the message where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is not None:
        return None
    return f"{what} needs lm-eval, which is not installed here. Fix: {INSTALL}"


@lru_cache(maxsize=4)
def find(settings: Settings, what: str = "harness") -> Tasks:
    """Find the tasks by name, without their data. Names may have * in them.

    Raises:
        ConfigError: lm-eval is not installed, or has no such task.
    """
    if (message := missing(f"{what}={','.join(settings.tasks)}")) is not None:
        raise ConfigError(message)
    with _quiet():
        from lm_eval.tasks import TaskManager

        manager, names = None, []
        if settings.include is not None:
            manager = TaskManager(include_path=settings.include, include_defaults=False)
            names = _matched(manager, settings.tasks)
        if manager is None or _unknown(names, settings.tasks):
            with Progress("reading lm-eval's list of tasks"):  # 15,000 files
                manager = TaskManager(include_path=settings.include)
            names = _matched(manager, settings.tasks)
    if unknown := _unknown(names, settings.tasks):
        close = difflib.get_close_matches(unknown[0], manager.all_tasks, n=1, cutoff=0.6)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(
            f"{what}={unknown[0]}: lm-eval has no task of this name.{hint} `lm-eval ls tasks` lists"
            " its own; a folder of others is named with include"
        )
    return Tasks(names, manager)


def _matched(manager: Any, names: tuple[str, ...]) -> list[str]:
    """Return the tasks of an index that names or patterns stand for. A path is no name: its file
    could run code."""
    return list(dict.fromkeys(manager.match_tasks(list(names))))


def _unknown(matched: list[str], names: tuple[str, ...]) -> list[str]:
    if not matched:
        return list(names)
    return [name for name in names if "*" not in name and name not in matched]


def evaluate(
    model: nn.Module,
    renderer: Renderer,
    stops: Stops,
    settings: Settings,
    tasks: Tasks,
    stop: Callable[[], bool] = lambda: False,
) -> Scores:
    """Let lm-eval evaluate a model.

    Args:
        renderer: has the tokenizer and the chat template.
        stops: what ends an answer, in addition to what a task names.
        stop: is called before each batch; True ends the evaluation.

    Raises:
        Interrupted: `stop` returned True. ConfigError: a task cannot be evaluated here.
    """
    if settings.chat and not renderer.templates:
        raise ConfigError("chat=true: this run was trained without a chat template. Leave chat out")

    def before_batch() -> None:
        if stop():
            raise Interrupted

    with _quiet():
        from lm_eval import simple_evaluate

        from trainer.evaluation import harness_model

        language_model = harness_model.make(
            model, renderer, stops, settings.batch_size, before_batch
        )
        try:
            # Its seeds are those of this process, which trains; greedy tasks need none.
            results = simple_evaluate(
                language_model,
                tasks=tasks.names,
                task_manager=tasks.manager,
                num_fewshot=settings.num_fewshot,
                limit=settings.limit,
                apply_chat_template=settings.chat,
                bootstrap_iters=RESAMPLES,
                random_seed=None,
                numpy_random_seed=None,
                torch_random_seed=None,
            )
        except (Interrupted, ConfigError):
            raise
        except Exception as error:
            if out_of_memory(error):
                raise
            raise ConfigError(_explained(error, tasks)) from error
    return scores(results or {})


def _explained(error: Exception, tasks: Tasks) -> str:
    first = str(error).strip().partition("\n")[0] or type(error).__name__
    text = f"lm-eval cannot evaluate {', '.join(tasks.names)}: {first}"
    if isinstance(error, OSError) or "Hub" in type(error).__name__:
        text += ". Its data are fetched from the Hub, unless its file names local ones"
    return text


def scores(results: dict[str, Any]) -> Scores:
    """Read what lm-eval returns. Its keys are METRIC,FILTER and METRIC_stderr,FILTER."""
    numbers = {}
    for task, values in results.get("results", {}).items():
        for key, value in values.items():
            metric, comma, way = key.partition(",")
            if not comma or isinstance(value, str | bool) or not math.isfinite(value):
                continue
            name = f"{task}/{metric.removesuffix('_stderr')}" + (f",{way}" if way != "none" else "")
            numbers[name + STDERR if metric.endswith("_stderr") else name] = float(value)
    rows = {task: n["effective"] for task, n in results.get("n-samples", {}).items()}
    return Scores(numbers, rows, results.get("samples", {}))


def row(which: str, settings: Settings, scores: Scores, seconds: float) -> dict[str, Any]:
    """Return the row of the journal: `which` is base or adapted."""
    values = {"model": which, "settings": settings.text, "rows": scores.rows}
    return values | scores.numbers | {"seconds": seconds}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm-eval's bars and prints, and compute its bootstraps in this process: a fork of a
    process that has threads can hang."""
    from tqdm.std import tqdm

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with (
        mock.patch.dict(os.environ, {"DISABLE_MULTIPROC": "1"}),
        mock.patch.object(tqdm, "__init__", partialmethod(tqdm.__init__, disable=True)),
    ):
        import lm_eval.api.metrics as metrics

        with mock.patch.object(metrics, "print", create=True):
            yield
