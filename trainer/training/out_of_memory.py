"""A step that does not fit into memory, repeated in smaller micro-batches.

A step's loss is a sum over its trained tokens, divided by their number, which is known before. So
the rows of a micro-batch may be run in several parts one after another: the gradients add up to the
same sum, up to rounding. The whole step is repeated, since a backward pass that fails may have
added some of its gradients.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.models.on_host import OF_WHOLE_BATCH

log = logging.getLogger("trainer")


class TooLarge(RuntimeError):
    """A step does not fit into memory even with one row at a time."""


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on the CPU or an accelerator."""
    text = str(error)
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "can't allocate memory" in text
        or "out of memory" in text.lower()
        or "CUBLAS_STATUS_ALLOC_FAILED" in text
    )


def parts(batch: dict[str, Any], rows: int | None) -> Iterator[tuple[dict[str, Any], float]]:
    """Yield the parts of a batch of trainer.data.batches.Collate with at most `rows` rows each, and
    their shares of its rows. The first part has all of its `tokens`, which are only counted."""
    total = len(batch["input_ids"])
    rows = rows or total
    if rows < total:
        batch = {key: value for key, value in batch.items() if key not in OF_WHOLE_BATCH}
    for first in range(0, total, rows):
        here = slice(first, first + rows)
        part = {
            key: value[here] if isinstance(value, Tensor | list) else value
            for key, value in batch.items()
        }
        if first:
            part["tokens"] = 0
        yield part, len(part["input_ids"]) / total


class Module(Protocol):
    """The part of FineTune that `Repeating` needs."""

    rows_at_once: int | None
    step: int
    smaller: dict[str, Any] | None
    trainer: Any

    @property
    def device(self) -> Any: ...

    def loss_of(self, batch: dict[str, Any], share: float = 1.0) -> Tensor: ...

    def restart_step(self) -> None: ...


class Repeating:
    """Runs the micro-batches of a step, forward and backward, in parts of `module.rows_at_once`
    rows. When memory runs out this number is halved, and the step is repeated from its first
    micro-batch.

    `refused` says why smaller parts would not give the same step; then it is not repeated.

    Lightning holds what `training_step` returns until the backward pass is over, and with it all
    activations. So it gets a number that stands for the loss, with whose factor the loss itself is
    multiplied.
    """

    def __init__(self, module: Module, refused: str | None):
        self.module, self.refused = module, refused
        self.window: list[dict[str, Any]] = []  # the micro-batches of the current step
        self.loss: Tensor | None = None
        self.fault = ""

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Run a micro-batch forward, unless it is run in parts. Return the number 1."""
        self.window.append(batch)
        self.loss, self.fault = None, ""
        if self.module.rows_at_once is None:
            self._attempt(lambda: self._set_loss(batch))
        return torch.ones((), device=self.module.device)

    def _set_loss(self, batch: dict[str, Any]) -> None:
        self.loss = self.module.loss_of(batch)

    def backward(self, factor: Tensor) -> None:
        """Run the micro-batch backward, with the loss multiplied by `factor`.

        Raises:
            TooLarge: a part of one row does not fit into memory.
        """
        done = False
        if self.module.rows_at_once is not None:
            done = self._attempt(lambda: self._in_parts(self.window[-1:], factor))
        elif self.loss is not None:
            done = self._attempt(lambda: self._through(factor))
        self.loss = None
        while not done:
            self._halve()
            self.module.restart_step()
            done = self._attempt(lambda: self._in_parts(self.window, factor))

    def _through(self, factor: Tensor) -> None:
        loss, self.loss = self.loss, None
        assert loss is not None
        (loss * factor).backward()

    def _in_parts(self, batches: list[dict[str, Any]], factor: Tensor) -> None:
        plugin = self.module.trainer.strategy.precision_plugin
        for batch in batches:
            for part, share in parts(batch, self.module.rows_at_once):
                with plugin.train_step_context():
                    loss = self.module.loss_of(part, share)
                (loss * factor).backward()

    def _attempt(self, call: Callable[[], None]) -> bool:
        """Return whether a call has fitted into memory."""
        try:
            call()
            return True
        except Exception as error:
            if not out_of_memory(error):
                raise
            self.fault = str(error).strip().partition("\n")[0] or type(error).__name__
            if self.refused is not None:
                log.warning(
                    "step %d did not fit into memory. It is not repeated in smaller micro-batches:"
                    " %s",
                    self.module.step + 1,
                    self.refused,
                )
                raise
        # the error is gone here, and with its frames the tensors of the failed pass
        self.loss = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return False

    def _halve(self) -> None:
        """Halve the number of rows that are run at a time."""
        before = max(len(batch["input_ids"]) for batch in self.window)
        before = min(before, self.module.rows_at_once or before)
        step = self.module.step + 1
        if before == 1:
            raise TooLarge(
                f"out of memory: step {step} does not fit even with one row at a time: {self.fault}"
            )
        self.module.rows_at_once = rows = -(-before // 2)
        self.module.smaller = {"rows": rows, "rows_before": before, "error": self.fault[:300]}
        log.warning(
            "step %d did not fit into memory (%s). It is repeated with %d instead of %d rows at a"
            " time, and so are all steps after it. Its update is the same, up to rounding;"
            " objective.repeat_smaller=false ends the run instead",
            step,
            self.fault[:200],
            rows,
            before,
        )
