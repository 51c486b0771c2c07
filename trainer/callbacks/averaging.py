"""Averages of the weights along the run: exponential (EMA), or the mean of all (SWA, Izmailov et
al. 2018, arXiv 1803.05407).

    EMA   a ← decay · a + (1 - decay) · w          SWA   a ← a + (w - a) / (n + 1), after n updates

Only what the optimiser trains is averaged, never a frozen base. For a low-rank adapter that is A
and B each by itself, and the mean of B times the mean of A is not the mean of B A: they agree while
the weights of the window stay close to each other, and what is evaluated and written is the former.
SWA is meant for a constant rate, before a cooldown.
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
from trainer.callbacks import Context, stop_requested
from trainer.callbacks.evaluation import Evaluation
from trainer.evaluation.loss import evaluating, losses
from trainer.schedules import length

log = logging.getLogger(__name__)


class Weights(nn.Module):
    """The trained tensors, in fp32 at least: in bf16 an average would stand still, since its
    updates are smaller than its rounding."""

    def __init__(self, trained: dict[str, nn.Parameter]):
        super().__init__()
        wide = (
            p.detach().to(torch.promote_types(p.dtype, torch.float32)) for p in trained.values()
        )
        self.tensors = nn.ParameterList(
            nn.Parameter(tensor, requires_grad=False) for tensor in wide
        )


class Averaging(lightning.Callback):
    """Averages the weights after step `start` and every `every` steps from then on, and evaluates
    the average wherever the Evaluation callback evaluates the weights themselves. It stands behind
    that one and before what saves, since checkpoints hold the average.

    It starts anew when a sparse adapter chooses its positions: an entry's mean over two positions
    means nothing.
    """

    def __init__(
        self, context: Context, kind: str, decay: float, start: float, every: int, export: bool
    ):
        self.context, self.kind, self.every, self.export = context, kind, every, export
        self.start = length(start, context.steps)
        self.update = get_ema_multi_avg_fn(decay) if kind == "ema" else get_swa_multi_avg_fn()
        self.trained: dict[str, nn.Parameter] = {}
        self.supports: list[Tensor] = []
        self.chosen: list[int] = []  # the supports' versions
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
        self.chosen = [support._version for support in self.supports]
        self.averages = AveragedModel(Weights(self.trained), multi_avg_fn=self.update)
        if self.loaded is not None and self.loaded["kind"] == self.kind:
            for name, average in self._by_name().items():
                average.copy_(self.loaded["averages"][name])
            self.averages.n_averaged.fill_(self.loaded["count"])
            self.evaluated = self.loaded["evaluated"]
        self._evaluate(trainer, module)  # a signal may have come in the middle of it

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not module.step_done:
            return
        assert self.averages is not None
        chosen = [support._version for support in self.supports]
        if chosen != self.chosen:
            self.chosen = chosen
            if self.count:
                log.info(
                    "the average starts anew after step %d, since the adapter has chosen its"
                    " positions",
                    module.step,
                )
            self.averages.n_averaged.zero_()
        if module.step >= self.start and (module.step - self.start) % self.every == 0:
            self.averages.update_parameters(Weights(self.trained))
        self._evaluate(trainer, module)

    def on_train_end(self, trainer: lightning.Trainer, module: Any) -> None:
        if not stop_requested(trainer, module, self.context):
            self._evaluate(trainer, module)

    @property
    def count(self) -> int:
        """Updates so far."""
        return int(self.averages.n_averaged) if self.averages is not None else 0

    def _by_name(self) -> dict[str, Tensor]:
        assert self.averages is not None
        return dict(
            zip(self.trained, (p.detach() for p in self.averages.parameters()), strict=True)
        )

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model with the averaged weights, and as it was afterwards, bit for bit."""
        kept = [p.detach().clone() for p in self.trained.values()]
        try:
            self._put(list(self._by_name().values()))
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, tensors: list[Tensor]) -> None:
        for parameter, tensor in zip(self.trained.values(), tensors, strict=True):
            parameter.copy_(tensor)

    def _evaluate(self, trainer: lightning.Trainer, module: Any) -> None:
        """Evaluate the average, if the weights of this step were evaluated and it was not yet."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        evaluation = next(
            (callback for callback in callbacks if isinstance(callback, Evaluation)), None
        )
        done = evaluation is not None and evaluation.state["evaluated"] == module.step
        if evaluation is None or not done or not self.count or self.evaluated == module.step:
            return
        assert self.context.held_out is not None
        started = time.monotonic()
        with self.in_place(), evaluating(module), trainer.precision_plugin.forward_context():
            values = losses(
                module.loss,
                self.context.held_out,
                evaluation.batch_size,
                module.device,
                trainer.global_rank,
                trainer.world_size,
                lambda sums: trainer.strategy.reduce(sums, reduce_op="sum"),
                lambda: stop_requested(trainer, module, self.context),
            )
        if not values:
            return
        values |= {"updates": self.count, "seconds": time.monotonic() - started}
        self.context.paused += values["seconds"]
        self.evaluated = module.step
        self.context.journal.write("average", module.step, values)
        log.info("the average of %d at step %d: loss %.4g", self.count, module.step, values["loss"])

    def save(self, write: Callable[[Path], None]) -> None:
        """Let `write` write the adapter to RUN/adapter-averaged while the averaged weights are in
        place; nothing without any."""
        folder = self.context.folder.path / "adapter-averaged"
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
