"""Numbers of a step that the host reads one step later. To read them at once, it would have to wait
for the device in every step.

The check that loss and gradient are finite stays on the device: a fused Adam changes neither
weights nor moments nor step counts where `found_inf` is 1. Numbers are copied to the host at the
end of their step, next to the device's further work, and read at the end of the next step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from trainer.models.losses import NonFinite

SKIPPING = (torch.optim.Adam, torch.optim.AdamW)  # with fused=true; SGD's first momentum is unset


class Copy:
    """Numbers on their way to the host: tensors, numbers and containers of them."""

    def __init__(self, numbers: Any):
        devices = {leaf.device for leaf in pytree.tree_leaves(numbers) if isinstance(leaf, Tensor)}
        self.numbers = pytree.tree_map_only(
            Tensor, lambda t: t.detach().to("cpu", non_blocking=True, copy=True), numbers
        )
        self.done: list[torch.cuda.Event] = []
        for device in devices:
            if device.type == "cuda":
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(device))
                self.done.append(event)

    def read(self) -> Any:
        """Return the numbers, with tensors on the CPU. It waits for their step alone."""
        for event in self.done:
            event.synchronize()
        return self.numbers


@dataclass
class Unread:
    """A step whose numbers the host has not read."""

    step: int
    sequences: list[Any]
    numbers: Copy  # loss and grad_norm
    # Writes the journal's rows of the step. True: only that it was skipped, since the run ends.
    write: Callable[[bool], None] | None = None


def end_run(count: int, step: int, sequences: list[Any], numbers: dict[str, Any]) -> NoReturn:
    """End the run after `count` bad steps in a row, of which `step` was the last.

    Raises:
        NonFinite: always.
    """
    loss, norm = float(numbers["loss"]), float(numbers["grad_norm"])
    raise NonFinite(
        f"{count} steps in a row, up to step {step}, had a loss or gradient that is not finite"
        f" (loss {loss:.4g}, gradient norm {norm:.4g}). Nothing was learnt from them. Lower"
        " optimizer.lr, raise the warm-up, or look at the rows of the last one:"
        f" {sequences[:16]}. metrics.jsonl has file and line of each, under skipped"
    )


def possible(module: Any) -> bool:
    """Return whether a module's steps can be read late: on one GPU, with an optimiser that can skip
    a step itself, and nothing that acts on each step's numbers at once."""
    trainer = module.trainer
    return (
        on_gpu(module)
        and trainer.world_size == 1
        and module.penalty is None
        and getattr(trainer.precision_plugin, "scaler", None) is None
        and module.adapter.ignores_skips()
        and not any(getattr(callback, "judges_steps", False) for callback in trainer.callbacks)
        and all(skips_itself(optimizer) for optimizer in trainer.optimizers)
    )


def on_gpu(module: Any) -> bool:
    """Return whether the module computes on a CUDA device. On a CPU nothing is waited for."""
    return bool(module.device.type == "cuda")


def skips_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimiser changes nothing where its `found_inf` is 1."""
    return type(optimizer) in SKIPPING and all(group["fused"] for group in optimizer.param_groups)


def skip_if(optimizers: list[torch.optim.Optimizer], finite: Tensor) -> None:
    """Let the next step of the optimisers change nothing unless `finite`, a bool on the device."""
    for optimizer in optimizers:
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
