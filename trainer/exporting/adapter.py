"""Adapters in PEFT's format, loaded back and compared."""

from __future__ import annotations

import logging
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from adapters import io
from adapters.peft_fields import NAME
from trainer.assembly.trained import Trained
from trainer.exporting.compare import Mismatch, compare, effect, outputs
from trainer.models.base import Base

log = logging.getLogger("trainer")
FILE = "adapter_model.safetensors"


def save_adapter(
    adapter: Any, model: nn.Module, base: Base, task: Any, folder: Path, pair: bool = False
) -> None:
    """Save the adapter as stock PEFT reads it; with `pair` a sparse one as SHiRA and LoRA."""
    save = adapter.save_pair if pair else adapter.save
    save(model, folder, base.path, io.task_type(model, task.kind == "label"))


@torch.no_grad()
def verify_adapter(run: Trained, folder: Path) -> float:
    """Load an adapter folder with stock PEFT onto a newly loaded base, compare its logits with the
    run's model in fp32, and return their distance.

    Raises:
        Mismatch: they differ, or PEFT has not read each tensor of the folder as it is.
    """
    expected = outputs(run.model, run)
    with run.adapter.disabled(run.model):
        base_logits = outputs(run.model, run)[-1]
    moved = effect(expected[-1], base_logits)
    base = run.base.load(torch.float32, run.task.labels if run.task.kind == "label" else None)
    with warnings.catch_warnings():
        # Every AdaLoRA gives this warning.
        warnings.filterwarnings("ignore", message="The following rank_pattern keys.*lora_E")
        loaded = run.adapter.load_stock(base, folder).eval()
    check_tensors(loaded, folder)
    difference = compare(expected, outputs(loaded, run), moved)
    if moved == 0.0 and not run.adapter.only_prepares:
        log.warning("the adapter changes no logit: did the loss fall? Or raise optimizer.lr")
    return difference


def check_tensors(loaded: nn.Module, folder: Path) -> None:
    """Check that PEFT has each tensor of an adapter folder, with its values, and no other: PEFT
    itself only warns of missing and unexpected ones.

    Raises:
        Mismatch: naming some of the tensors.
    """
    file = folder / FILE
    live: Any = loaded
    if not file.exists() or live.peft_config[NAME].peft_type == "ADALORA":
        return  # a pair of adapters; and AdaLoRA's ranks are cut as it is loaded
    saved = load_file(file)
    read = get_peft_model_state_dict(live, save_embedding_layers=False)
    missing, unread = sorted(read.keys() - saved.keys()), sorted(saved.keys() - read.keys())
    different = [
        name
        for name in sorted(read.keys() & saved.keys())
        if not _equal(read[name].float(), saved[name].float())
    ]
    faults = [
        f"{len(names)} {kind}, such as {names[0]}"
        for names, kind in (
            (missing, "tensors are not in the file"),
            (unread, "of the file are not read"),
            (different, "have other values"),
        )
        if names
    ]
    if faults:
        raise Mismatch(
            f"stock PEFT {version('peft')} reads the adapter differently from what was written:"
            f" {'; '.join(faults)}. Export the merged model with to=merged"
        )


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other.to(one.device))
