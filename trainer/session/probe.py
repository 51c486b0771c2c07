"""Two steps on the longest batch of a run: what the run really takes, before it starts."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import psutil
import torch
from torch.utils.data import DataLoader

from trainer.assembly import quiet
from trainer.assembly.recipe import Recipe
from trainer.config.errors import ConfigError
from trainer.data.batches import BatchOrder, Pick
from trainer.session import kernels
from trainer.session.model import calibrate_penalty, load_model, make_module
from trainer.session.start_point import StartPoint
from trainer.training.lightning_trainer import make_trainer

STEPS = 2  # the first makes the optimiser's moments, the second runs with them
SAMPLE_SECONDS = 0.002  # between two readings of the process's memory


@dataclass
class Peak:
    """The most memory in use while it was measured, in bytes above what was in use before."""

    bytes: int = 0


@dataclass
class StepTimes(lightning.Callback):
    """The seconds of each optimiser step."""

    seconds: list[float] = field(default_factory=list)
    start: float = 0.0

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock at a step's first micro-batch."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.start = time.monotonic()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the clock after a step's last micro-batch."""
        if module.step_done:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds.append(time.monotonic() - self.start)


def refuse(recipe: Recipe) -> None:
    """Refuse a run without a batch that is known beforehand, or with several processes.

    Raises:
        ConfigError: says which it is.
    """
    config = recipe.config
    faults = {
        "the run trains nothing": not recipe.trains,
        "task.streaming=true shows its rows only while it trains": recipe.order is None,
        "it measures one process: set lightning.devices=1 and lightning.num_nodes=1": (
            recipe.ranks > 1
        ),
        "target.features would first compute the hidden states of all rows: leave it out": (
            config["target"]["features"] is not None
        ),
    }
    for reason, is_so in faults.items():
        if is_so:
            raise ConfigError(f"probe=true cannot be used here: {reason}")


def longest_step(order: BatchOrder, steps: int) -> list[list[Pick]]:
    """Return the micro-batches of the step of the first epoch, or of `steps` if they are fewer,
    that holds the micro-batch with the most tokens, padding included."""

    def size(micro_batch: list[Pick]) -> int:
        return len(micro_batch) * max(int(order.lengths[pick.sequence]) for pick in micro_batch)

    epoch = -(-len(order.lengths) // order.per_step)
    windows = (order.micro_batches(step) for step in range(max(1, min(epoch, steps))))
    return max(windows, key=lambda window: max(map(size, window)))


def probe(recipe: Recipe) -> dict[str, Any]:
    """Load the model, train STEPS steps on the longest batch, and return what was measured.

    Returns:
        `peak_bytes`: memory above what the process held before, on the device that trains.
        `step_seconds`: of the last step. `tokens`: of that step, padding included.

    Raises:
        ConfigError: see `refuse`. What the run itself would raise, such as an error of memory.
    """
    refuse(recipe)
    order, data = recipe.order, recipe.data
    assert order is not None
    assert data.train is not None
    window = longest_step(order, recipe.steps)
    accumulate = len(window)
    config = recipe.config | {"accumulate": accumulate}
    recipe = dataclasses.replace(recipe, config=config)
    quiet.quiet()  # Lightning, imported since, has set its own log level
    times = StepTimes()
    with measured(recipe.device) as peak, tempfile.TemporaryDirectory() as folder:
        kernels.set_up_process(config)
        start = kernels.choose(StartPoint(), recipe, None)
        module = make_module(recipe, load_model(recipe, start, Path(folder)), start)
        if module.penalty is not None:
            calibrate_penalty(module, recipe)
        trainer = make_trainer(config, recipe.adapter, Path(folder))
        trainer.callbacks = [times]  # type: ignore[attr-defined]
        batches = [data.collate([data.train[pick] for pick in picks]) for picks in window]
        trainer.fit(module.train(), DataLoader(batches * STEPS, batch_size=None))  # type: ignore[arg-type]
    return {
        "peak_bytes": peak.bytes,
        "step_seconds": times.seconds[-1],
        "tokens": sum(int(batch["input_ids"].numel()) for batch in batches),
    }


def in_use() -> int:
    """Return the memory of this process without the pages of files, such as those of weights that
    are being read: the system takes these back when memory is short."""
    info = psutil.Process().memory_info()
    return int(info.rss - getattr(info, "shared", 0))


@contextlib.contextmanager
def measured(device: torch.device) -> Iterator[Peak]:
    """Measure the most memory that is in use while this is open: the device's on CUDA, else the
    process's."""
    peak = Peak()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        try:
            yield peak
        finally:
            peak.bytes = torch.cuda.max_memory_reserved(device) - before
        return
    ended = threading.Event()
    before = in_use()

    def watch() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            peak.bytes = max(peak.bytes, in_use() - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()
