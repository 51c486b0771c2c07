"""Adapters in PEFT's format, loaded back and compared."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.assembly.trained import Trained
from trainer.exporting.compare import compare, outputs
from trainer.models.base import Base

log = logging.getLogger("trainer")


def save_adapter(
    adapter: Any, model: nn.Module, base: Base, task: Any, folder: Path, pair: bool = False
) -> None:
    """Save the adapter as stock PEFT reads it; with `pair` a sparse one as SHiRA and LoRA."""
    save = adapter.save_pair if pair else adapter.save
    save(model, folder, base.path, "SEQ_CLS" if task.kind == "label" else "CAUSAL_LM")


@torch.no_grad()
def verify_adapter(run: Trained, folder: Path) -> float:
    """Load an adapter folder with stock PEFT onto a newly loaded base, compare its logits with the
    run's model in fp32, and return their distance.

    Raises:
        Mismatch: they differ.
    """
    expected = outputs(run.model, run)
    base = run.base.load(torch.float32, run.task.labels if run.task.kind == "label" else None)
    with warnings.catch_warnings():
        # Every AdaLoRA gives this warning.
        warnings.filterwarnings("ignore", message="The following rank_pattern keys.*lora_E")
        loaded = run.adapter.load_stock(base, folder).eval()
    difference = compare(expected, outputs(loaded, run))
    with run.adapter.disabled(run.model):
        base_logits = outputs(run.model, run)[-1]
    # Virtual tokens come before the row's own.
    if torch.equal(expected[-1][:, -base_logits.shape[1] :], base_logits):
        log.warning("the adapter changes no logit: was it trained?")
    return difference
