"""Adapters in PEFT's format, loaded back and compared."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.assembly.trained import Trained
from trainer.exporting.compare import _compare, _outputs
from trainer.models.base import Base

log = logging.getLogger("trainer")


def save_adapter(
    adapter: Any, model: nn.Module, base: Base, task: Any, folder: Path, pair: bool = False
) -> None:
    """The adapter as stock PEFT reads it; a sparse one as a `pair` of SHiRA and LoRA where that is
    asked for."""
    save = adapter.save_pair if pair else adapter.save
    save(model, folder, base.path, "SEQ_CLS" if task.kind == "label" else "CAUSAL_LM")


@torch.no_grad()
def verify_adapter(found: Trained, folder: Path) -> float:
    """Load an adapter folder with stock PEFT onto a fresh base, and hold its logits against the
    run's model, in fp32.

    Raises:
        Mismatch: they differ.
    """
    wanted = _outputs(found.model, found)
    fresh = found.base.load(
        torch.float32, found.task.labels if found.task.kind == "label" else None
    )
    with warnings.catch_warnings():
        # of every AdaLoRA
        warnings.filterwarnings("ignore", message="The following rank_pattern keys.*lora_E")
        loaded = found.adapter.load_stock(fresh, folder).eval()
    difference = _compare(wanted, _outputs(loaded, found))
    with found.adapter.disabled(found.model):
        alone = _outputs(found.model, found)[-1]
    # virtual tokens stand before the row's own
    if torch.equal(wanted[-1][:, -alone.shape[1] :], alone):
        log.warning("the adapter changes no logit: was it trained?")
    return difference
