"""Averages of the weights along the run: exponential (EMA), or the mean of all (SWA, Izmailov et
al. 2018, arXiv 1803.05407).

    EMA   a ← decay · a + (1 - decay) · w          SWA   a ← a + (w - a) / (n + 1), after n updates

Only the trained tensors are averaged, never a frozen base. A low-rank adapter's A and B are
averaged separately. The mean of B times the mean of A is not the mean of B A, but close to it while
the averaged weights are close to each other. The product of the means is evaluated and written. SWA
is meant for a constant rate, before a cooldown.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from adapters.delta import Delta
from trainer.callbacks import RunState, stop_requested
from trainer.callbacks.evaluation import Evaluation
from trainer.evaluation.loss import evaluating, losses
from trainer.schedules import length

log = logging.getLogger(__name__)


class Weights(nn.Module):
    """The trained tensors, in fp32 or wider. In bf16 an average would not change: its updates are
    smaller than the rounding error."""

    def __init__(self, trained: dict[str, nn.Parameter]):
        super().__init__()
        tensors = (
            p.detach().to(torch.promote_types(p.dtype, torch.float32)) for p in trained.values()
        )
        self.tensors = nn.ParameterList(
            nn.Parameter(tensor, requires_grad=False) for tensor in tensors
        )


class Averaging(lightning.Callback):
    """Averages the weights after step `start` and every `every` steps after it. Evaluates the
    average at each step where the Evaluation callback evaluates the weights themselves.

    The average restarts when a sparse adapter chooses its positions: a mean over values of two
    positions has no meaning.
    """

    def __init__(
        self, run_state: RunState, kind: str, decay: float, start: float, every: int, export: bool
    ):
        self.run_state, self.kind, self.every, self.export = run_state, kind, every, export
        self.start = length(start, run_state.steps)
        self.update = get_ema_multi_avg_fn(decay) if kind == "ema" else get_swa_multi_avg_fn()
        self.trained: dict[str, nn.Parameter] = {}
        self.supports: list[Tensor] = []
        self.versions: list[int] = []  # of the supports; torch counts a tensor's changes in place
        self.averages: AveragedModel | None = None
        self.loaded: dict[str, Any] | None = None
        self.evaluated = -1

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        optimised = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
        self.trained = {name: p for name, p in module.named_parameters() if id(p) in optimised}
        deltas = [delta for delta in module.modules() if isinstance(delta, Delta)]
        self.supports = [
            b for delta in deltas for name, b in delta.named_buffers() if name in delta.state_dict()
        ]
        self.versions = [support._version for support in self.supports]
        self.averages = AveragedModel(Weights(self.trained), multi_avg_fn=self.update)
        if self.loaded is not None and self.loaded["kind"] == self.kind:
            for name, average in self._by_name().items():
                average.copy_(self.loaded["averages"][name])
            self.averages.n_averaged.fill_(self.loaded["count"])
            self.evaluated = self.loaded["evaluated"]
        # repeats an evaluation of the average that a signal interrupted
        self._evaluate(trainer, module)

    def after_step(self, trainer: lightning.Trainer, module: Any) -> None:
        """Add the current weights to the average, and evaluate it."""
        assert self.averages is not None
        versions = [support._version for support in self.supports]
        if versions != self.versions:
            self.versions = versions
            if self.count:
                log.info(
                    "the average restarts after step %d: the adapter has chosen its positions",
                    module.step,
                )
            self.averages.n_averaged.zero_()
        if module.step >= self.start and (module.step - self.start) % self.every == 0:
            self.averages.update_parameters(Weights(self.trained))
        self._evaluate(trainer, module)

    def evaluate_last(self, trainer: lightning.Trainer, module: Any) -> None:
        """Evaluate the average of a run that ended before its planned steps."""
        if not stop_requested(trainer, module, self.run_state):
            self._evaluate(trainer, module)

    @property
    def count(self) -> int:
        """The number of updates so far."""
        return int(self.averages.n_averaged) if self.averages is not None else 0

    def _by_name(self) -> dict[str, Tensor]:
        assert self.averages is not None
        return dict(
            zip(self.trained, (p.detach() for p in self.averages.parameters()), strict=True)
        )

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the averaged weights into the model, and restore its own afterwards, bit for bit."""
        weights = [p.detach().clone() for p in self.trained.values()]
        try:
            self._put(list(self._by_name().values()))
            yield
        finally:
            self._put(weights)

    @torch.no_grad()
    def _put(self, tensors: list[Tensor]) -> None:
        for parameter, tensor in zip(self.trained.values(), tensors, strict=True):
            parameter.copy_(tensor)

    def _evaluate(self, trainer: lightning.Trainer, module: Any) -> None:
        """Evaluate the average of this step once, if its weights were evaluated."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        evaluation = next(
            (callback for callback in callbacks if isinstance(callback, Evaluation)), None
        )
        done = evaluation is not None and evaluation.state["evaluated"] == module.step
        if evaluation is None or not done or not self.count or self.evaluated == module.step:
            return
        assert self.run_state.held_out is not None
        started = time.monotonic()
        with self.in_place(), evaluating(module), trainer.precision_plugin.forward_context():
            values = losses(
                module.loss,
                self.run_state.held_out,
                evaluation.batch_size,
                module.device,
                trainer.global_rank,
                trainer.world_size,
                lambda sums: trainer.strategy.reduce(sums, reduce_op="sum"),
                lambda: stop_requested(trainer, module, self.run_state),
            )
        if not values:
            return
        values |= {"updates": self.count, "seconds": time.monotonic() - started}
        self.run_state.paused_seconds += values["seconds"]
        self.evaluated = module.step
        self.run_state.journal.write("average", module.step, values)
        log.info("average of %d at step %d: loss %.4g", self.count, module.step, values["loss"])

    def save(self, write: Callable[[Path], None]) -> None:
        """Call `write` with RUN/adapter-averaged while the model has the averaged weights. If there
        is no average, do nothing."""
        folder = self.run_state.folder.path / "adapter-averaged"
        if not self.export or not self.count:
            return
        with self.in_place():
            write(folder)
        log.info("the averaged adapter, of %d updates: %s", self.count, folder)

    def state_dict(self) -> dict[str, Any]:
        if self.averages is None:
            return self.loaded or {}
        return {
            "kind": self.kind,
            "averages": self._by_name(),
            "count": self.count,
            "evaluated": self.evaluated,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loaded = state_dict or None
