"""Held-out rows, and everything that is needed to evaluate a model on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from trainer.data.batches import Sequences
from trainer.data.stops import Stops


@dataclass
class HeldOut:
    """The evaluation split: its rows, and the prompts whose answers are graded."""

    sequences: Sequences
    collate: Callable[..., dict[str, Any]]
    labels: list[str] | None  # the classes of a classification task
    # (example, prompt ids) of the answers that are generated
    prompts: list[tuple[Any, list[int]]] = field(default_factory=list)
    grade: Callable[[Any, str], dict[str, float]] | None = None
    tokenizer: Any = None
    stops: Stops = field(default_factory=Stops)
    more: dict[str, HeldOut] = field(default_factory=dict)  # further sets of evaluation, by name


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the batch with its tensors on `device`."""
    return {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }
