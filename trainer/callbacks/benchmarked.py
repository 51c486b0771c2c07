"""Benchmarks of lm-eval during training, as part of an evaluation."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from adapters.full import Full, Nothing
from trainer.callbacks import RunState
from trainer.config.errors import ConfigError
from trainer.evaluation import harness

log = logging.getLogger(__name__)
WHAT = "callbacks.evaluation.harness"


class Benchmarks:
    """Measures the tasks of `settings` with the model of a run, whose journal gets the scores.

    Raises:
        ConfigError: the run holds out no rows, and so it is never evaluated.
    """

    def __init__(self, settings: harness.Settings, run_state: RunState):
        self.settings, self.run_state = settings, run_state
        if run_state.held_out is None or not len(run_state.held_out.sequences):
            raise ConfigError(
                f"{WHAT}={','.join(settings.tasks)}: a run is evaluated only if it holds out rows,"
                " and this one holds out none. Set task.eval_path, or use graft evaluate harness="
            )

    def measure(self, module: Any, stop: Callable[[], bool]) -> dict[str, float] | None:
        """Return the scores, {} if they cannot be measured; None if `stop` returned True.

        Raises:
            ConfigError: they cannot be measured before training, which then does not begin.
        """
        state, step, started = self.run_state, module.step, time.monotonic()
        assert state.renderer is not None
        try:
            tasks = harness.find(self.settings, WHAT)
            scores = harness.evaluate(
                module.model, state.renderer, state.stops, self.settings, tasks, stop
            )
        except harness.Interrupted:
            return None
        except ConfigError as error:
            if step == 0:
                raise
            log.warning("%s. The run continues without these scores", error)
            return {}
        untrained = state.evaluate_base_first or isinstance(module.adapter, Full | Nothing)
        which = "base" if step == 0 and untrained else "adapted"
        seconds = time.monotonic() - started
        state.journal.write(harness.KIND, step, harness.row(which, self.settings, scores, seconds))
        return scores.numbers


def refuse_unknown(config: dict[str, Any]) -> None:
    """Find the tasks that a run is measured on, before its base is loaded.

    Raises:
        ConfigError: lm-eval lacks one.
    """
    evaluation = config["callbacks"].get("evaluation")
    if evaluation and evaluation["harness"]:
        harness.find(
            harness.Settings(tuple(evaluation["harness"]), evaluation["harness_include"]), WHAT
        )
