"""Held-out rows, and what is needed to grade answers to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from trainer.data.batches import Sequences


@dataclass
class HeldOut:
    """The evaluation split, ready to be asked."""

    sequences: Sequences
    collate: Callable[..., dict[str, Any]]
    labels: list[str] | None  # classes, for classification
    # (example, prompt ids) whose answers are generated
    prompts: list[tuple[Any, list[int]]] = field(default_factory=list)
    grade: Callable[[Any, str], dict[str, float]] | None = None
    tokenizer: Any = None
    stops: list[int] = field(default_factory=list)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`."""
    return {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }
