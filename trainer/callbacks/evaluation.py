"""Evaluation before, during and after training; the best step; stopping early."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from functools import partial
from typing import Any

import lightning

from trainer.callbacks import Context, every_steps, stop_requested
from trainer.evaluation.answers import answers, means
from trainer.evaluation.loss import evaluating, losses
from trainer.training.fsdp import Sharded, reshard

log = logging.getLogger(__name__)


class Evaluation(lightning.Callback):
    """Held-out loss every `every` steps; answers of the first `generate` held-out rows generated
    and graded before and after training, and at every `generate_every`-th evaluation between."""

    def __init__(
        self,
        context: Context,
        every: float | None,
        batch_size: int,
        generate: int,
        generate_every: int | None,
        samples: int,
        max_new_tokens: int,
        monitor: str,
        mode: str,
        patience: int | None,
    ):
        self.context, self.batch_size, self.generate, self.samples = (
            context,
            batch_size,
            generate,
            samples,
        )
        self.every, self.generate_every = every_steps(every, context.steps), generate_every
        self.max_new_tokens, self.monitor, self.sign, self.patience = (
            max_new_tokens,
            monitor,
            1 if mode == "min" else -1,
            patience,
        )
        self.state: dict[str, Any] = {
            "evaluated": -1,
            "best": math.inf,
            "best_step": None,
            "without": 0,
            "count": 0,
        }

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        if self.state["evaluated"] < 0:
            base_alone = (
                module.adapter.disabled(module.model)
                if self.context.before
                else contextlib.nullcontext()
            )
            with base_alone:
                self.run(trainer, module, graded=True)
        # a signal came in the middle of it
        elif self.due(module.step) and self.state["evaluated"] < module.step:
            self.run(trainer, module, graded=module.step >= self.context.steps)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.context.improved = False
        if module.step_done and self.due(module.step):
            self.run(trainer, module, graded=module.step >= self.context.steps)

    def on_train_end(self, trainer: lightning.Trainer, module: Any) -> None:
        # The run ended before its planned steps: it stopped early, or its time was up.
        if self.state["evaluated"] < module.step and not stop_requested(
            trainer, module, self.context
        ):
            self.run(trainer, module, graded=True)

    def due(self, step: int) -> bool:
        """Whether a step is one after which the run is evaluated: every `every`-th, and the
        last."""
        return step > 0 and (
            step >= self.context.steps or (self.every is not None and step % self.every == 0)
        )

    def run(self, trainer: lightning.Trainer, module: Any, graded: bool = False) -> None:
        """Evaluate now, unless a signal to stop comes first."""
        held_out = self.context.held_out
        if held_out is None or not len(held_out.sequences):
            return
        started = time.monotonic()
        strategy = trainer.strategy
        with evaluating(module), trainer.precision_plugin.forward_context():
            values = losses(
                module.loss,
                held_out,
                self.batch_size,
                module.device,
                trainer.global_rank,
                trainer.world_size,
                lambda sums: strategy.reduce(sums, reduce_op="sum"),
                lambda: stop_requested(trainer, module, self.context),
            )
            if not values:
                return
            found: list[dict[str, Any]] | None = []
            count = self.state["count"] + 1
            graded = graded or (
                self.generate_every is not None and count % self.generate_every == 0
            )
            sharded = isinstance(strategy, Sharded)  # no process has the weights alone
            if (
                graded
                and held_out.prompts
                and (self.generate or self.samples)
                and (trainer.is_global_zero or sharded)
            ):
                all_ask = partial(stop_requested, trainer, module, self.context)
                stop = all_ask if sharded else lambda: self.context.signals.received is not None
                found = answers(
                    module.model,
                    held_out,
                    self.batch_size,
                    self.max_new_tokens,
                    module.device,
                    stop,
                )
            if sharded:
                reshard(module.model)
        if found and self.generate:
            values |= means(found[: self.generate])
        # The others wait here while the first one generates, and learn what came of it: all have to
        # judge alike.
        agreed = strategy.broadcast([] if found is None else [values])
        if not agreed:
            return
        values = agreed[0]
        if found:
            self.context.journal.write_samples(module.step, found[: self.samples])
        values["seconds"] = time.monotonic() - started
        self.context.paused += values["seconds"]
        self.state |= {"evaluated": module.step, "count": count}
        self.context.journal.write("evaluation", module.step, values)
        shown = "  ".join(
            f"{name} {value:.4g}" for name, value in values.items() if name != "seconds"
        )
        log.info("evaluation at step %d: %s", module.step, shown)
        self._judge(values, module.step, trainer)

    def _judge(self, values: dict[str, float], step: int, trainer: lightning.Trainer) -> None:
        if self.monitor not in values:
            return  # a score of generated answers, which this evaluation did not ask for
        value = self.sign * values[self.monitor]
        if value < self.state["best"]:
            self.state |= {"best": value, "best_step": step, "without": 0}
            self.context.improved = step > 0
        elif step > 0:
            self.state["without"] += 1
        self.context.without = self.state["without"]
        if self.patience is not None and self.state["without"] >= self.patience:
            self.context.stopped = (
                f"no better {self.monitor} in {self.patience} evaluations; the best was at step"
                f" {self.state['best_step']}"
            )

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = dict(state_dict)
        self.context.without = self.state["without"]
