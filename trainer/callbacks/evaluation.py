"""Evaluation before, during and after training; the best step; stopping early."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import lightning

from trainer.callbacks import RunState, every_steps, stop_requested
from trainer.callbacks.benchmarked import Benchmarks
from trainer.data.held_out import HeldOut
from trainer.decoding.merged import merged
from trainer.evaluation.answers import answers, means
from trainer.evaluation.harness import Settings
from trainer.evaluation.loss import evaluating, losses, prefixed
from trainer.storage.journal import NO_METRICS
from trainer.training.fsdp import Sharded, resharding

log = logging.getLogger(__name__)


class Evaluation(lightning.Callback):
    """Measures the held-out loss every `every` steps. Before and after training, and at every
    `generate_every`-th evaluation between, it also generates and grades answers to the first
    `generate` held-out rows; before training only to `generate_before` of them, if that is set.
    The tasks of `harness` are measured by lm-eval at both ends, and at every `harness_every`-th
    evaluation between."""

    def __init__(
        self,
        run_state: RunState,
        every: float | None,
        batch_size: int,
        generate: int,
        generate_every: int | None,
        generate_before: int | None,
        samples: int,
        max_new_tokens: int,
        monitor: str,
        mode: str,
        patience: int | None,
        harness: list[str],
        harness_every: int | None,
        harness_include: str | None,
        harness_limit: float | None,
        harness_num_fewshot: int | None,
        harness_chat: bool,
    ):
        self.run_state, self.batch_size, self.generate, self.samples = (
            run_state,
            batch_size,
            generate,
            samples,
        )
        self.every, self.generate_every = every_steps(every, run_state.steps), generate_every
        self.generate_before = generate if generate_before is None else generate_before
        self.max_new_tokens, self.monitor, self.sign, self.patience = (
            max_new_tokens,
            monitor,
            1 if mode == "min" else -1,
            patience,
        )
        self.benchmarks: Benchmarks | None = None
        self.benchmarks_every = harness_every
        if harness:
            questions = Settings(
                tuple(harness),
                harness_include,
                harness_limit,
                harness_num_fewshot,
                harness_chat,
                batch_size,
            )
            self.benchmarks = Benchmarks(questions, run_state)
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
                if self.run_state.evaluate_base_first
                else contextlib.nullcontext()
            )
            with base_alone:
                self.run(trainer, module, graded=True)
        # a signal interrupted the evaluation of this step
        elif self.due(module.step) and self.state["evaluated"] < module.step:
            self.run(trainer, module, graded=module.step >= self.run_state.steps)

    def evaluate_if_due(self, trainer: lightning.Trainer, module: Any) -> bool:
        """Evaluate after the current step, if it is due. Return whether it is the best so far."""
        if not self.due(module.step):
            return False
        return self.run(trainer, module, graded=module.step >= self.run_state.steps)

    def evaluate_last(self, trainer: lightning.Trainer, module: Any) -> bool:
        """Evaluate a run that ended before its planned steps. Return whether it is the best so
        far."""
        if self.state["evaluated"] >= module.step or stop_requested(
            trainer, module, self.run_state
        ):
            return False
        return self.run(trainer, module, graded=True)

    def due(self, step: int) -> bool:
        """Return whether the run is evaluated after a step: every `every`-th, and the last."""
        return step > 0 and (
            step >= self.run_state.steps or (self.every is not None and step % self.every == 0)
        )

    def run(self, trainer: lightning.Trainer, module: Any, graded: bool = False) -> bool:
        """Evaluate now, unless a signal to stop interrupts it. Return whether the step is the best
        so far."""
        held_out = self.run_state.held_out
        if held_out is None or not len(held_out.sequences):
            return False
        started = time.monotonic()
        strategy, count = trainer.strategy, self.state["count"] + 1
        benchmarks = self.benchmarks if self._has_benchmarks(count, graded) else None
        graded = graded or (self.generate_every is not None and count % self.generate_every == 0)
        with (
            resharding(module.model),
            evaluating(module),
            trainer.precision_plugin.forward_context(),
        ):
            values = self._all_losses(trainer, module, held_out)
            if not values:
                return False
            losses_done = time.monotonic()
            texts, of_sets = self._all_answers(trainer, module, held_out, graded)
            answers_done = time.monotonic()
            scores: dict[str, float] | None = {}
            if texts is not None and benchmarks is not None:
                scores = self._scores(trainer, module, benchmarks)
        count_graded = self._graded(module.step)
        if texts and count_graded:
            values |= means(texts[:count_graded])
            for name, its in of_sets.items():
                values |= prefixed(name, means(its[:count_graded]))
        # Ranks other than 0 wait here while rank 0 generates. They get its values, so that all
        # ranks judge by the same numbers.
        interrupted = texts is None or scores is None
        shared_values = strategy.broadcast([] if interrupted else [values, scores or {}])
        if not shared_values:
            return False
        values = shared_values[0]
        if texts:
            self.run_state.journal.write_samples(module.step, texts[: self.samples])
            values |= {
                "answers": min(count_graded, len(texts)),
                "answer_seconds": answers_done - losses_done,
            }
        values["seconds"] = time.monotonic() - started
        self.run_state.paused_seconds += values["seconds"]
        self.state |= {"evaluated": module.step, "count": count}
        self.run_state.journal.write("evaluation", module.step, values)
        log.info("evaluation at step %d: %s", module.step, _text(values))
        return self._judge(shared_values[1] | values, module.step)

    def _all_losses(
        self, trainer: lightning.Trainer, module: Any, held_out: HeldOut
    ) -> dict[str, float]:
        """Return the losses of the held-out rows and of the further sets; {} if a signal to stop
        interrupted them."""
        values = self._losses(trainer, module, held_out)
        for name, further in held_out.more.items() if values else ():
            of_set = self._losses(trainer, module, further)
            if not of_set:
                return {}
            values = values | prefixed(name, of_set)
        return values

    def _all_answers(
        self, trainer: lightning.Trainer, module: Any, held_out: HeldOut, graded: bool
    ) -> tuple[list[dict[str, Any]] | None, dict[str, Any]]:
        """Return the answers to the held-out rows, None if a signal to stop interrupted them, and
        those of the further sets by name."""
        of_sets: dict[str, Any] = {}
        texts = self._answers(trainer, module, held_out) if graded else []
        for name, further in held_out.more.items() if graded and texts is not None else ():
            of_sets[name] = self._answers(trainer, module, further)
            if of_sets[name] is None:
                return None, of_sets
        return texts, of_sets

    def _has_benchmarks(self, count: int, ends: bool) -> bool:
        """Return whether the `count`-th evaluation has benchmarks. Those at both `ends` of a run
        do."""
        every = self.benchmarks_every
        return ends or (every is not None and count % every == 0)

    def _losses(
        self, trainer: lightning.Trainer, module: Any, held_out: HeldOut
    ) -> dict[str, float]:
        """Return the loss of one set and what is measured with it; {} if a signal to stop
        interrupted it."""
        return losses(
            module.loss,
            held_out,
            self.batch_size,
            module.device,
            trainer.global_rank,
            trainer.world_size,
            lambda sums: trainer.strategy.reduce(sums, reduce_op="sum"),
            lambda: stop_requested(trainer, module, self.run_state),
        )

    def _answers(
        self, trainer: lightning.Trainer, module: Any, held_out: HeldOut
    ) -> list[dict[str, Any]] | None:
        """Generate and grade answers, on rank 0; None if a signal to stop interrupted it."""
        sharded = isinstance(trainer.strategy, Sharded)  # then all ranks must generate together
        if not held_out.prompts or not (self.generate or self.samples):
            return []
        if not trainer.is_global_zero and not sharded:
            return []
        stop = self._stop(trainer, module)
        count = max(self._graded(module.step), self.samples)
        some = replace(held_out, prompts=held_out.prompts[:count])
        with merged(module.model):
            return answers(
                module.model, some, self.batch_size, self.max_new_tokens, module.device, stop
            )

    def _scores(
        self, trainer: lightning.Trainer, module: Any, benchmarks: Benchmarks
    ) -> dict[str, float] | None:
        """Let lm-eval measure the model, on rank 0; None if a signal to stop interrupted it."""
        if not trainer.is_global_zero and not isinstance(trainer.strategy, Sharded):
            return {}
        with merged(module.model):
            return benchmarks.measure(module, self._stop(trainer, module))

    def _stop(self, trainer: lightning.Trainer, module: Any) -> Callable[[], bool]:
        """Return what says between two batches whether a signal came. Sharded ranks, which must
        compute together, also decide together."""
        if isinstance(trainer.strategy, Sharded):
            return partial(stop_requested, trainer, module, self.run_state)
        return lambda: self.run_state.signals.received is not None

    def _graded(self, step: int) -> int:
        """Return how many answers of each set are graded after a step."""
        return self.generate if step else min(self.generate, self.generate_before)

    def _judge(self, values: dict[str, float], step: int) -> bool:
        """Return whether these are the best values so far. After `patience` evaluations without a
        better one, stop the run."""
        if self.monitor not in values:
            return False  # a score of generated answers, which this evaluation did not generate
        improved = False
        value = self.sign * values[self.monitor]
        if value < self.state["best"]:
            self.state |= {"best": value, "best_step": step, "without": 0}
            improved = step > 0
        elif step > 0:
            self.state["without"] += 1
        self.run_state.evals_since_best = self.state["without"]
        if self.patience is not None and self.state["without"] >= self.patience:
            self.run_state.stopped = (
                f"no better {self.monitor} in {self.patience} evaluations; the best was at step"
                f" {self.state['best_step']}"
            )
        return improved

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = dict(state_dict)
        self.run_state.evals_since_best = self.state["without"]


def _text(values: dict[str, Any]) -> str:
    """Return the numbers of an evaluation, and the time of the loss and of the answers."""
    numbers = "  ".join(
        f"{name} {value:.4g}" for name, value in values.items() if name not in NO_METRICS
    )
    answering = values.get("answer_seconds", 0.0)
    times = f"loss {values['seconds'] - answering:.1f} s"
    if "answers" in values:
        times += f", {values['answers']} graded answers {answering:.1f} s"
    return f"{numbers}  ({times})"
