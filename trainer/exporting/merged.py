"""Merged models in transformers' format."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from trainer.assembly.trained import Trained
from trainer.exporting import mtp_layers
from trainer.exporting.compare import TOLERANCE, Mismatch, _compare, _distance, _outputs, _rows
from trainer.models.base import Base

log = logging.getLogger("trainer")


@torch.no_grad()
def _write_merged(found: Trained, folder: Path, dtype: torch.dtype, mtp: bool) -> float:
    wanted = _outputs(found.model, found)
    merged: Any = found.adapter.merge(found.model)
    difference = _compare(wanted, _outputs(merged, found))
    if mtp:
        mtp_layers.check(found.drafter, merged)
    _cast(merged, dtype)
    merged.config.dtype = dtype
    merged.save_pretrained(folder)
    # From its source again: the tokenizer in use had its length limit lifted.
    AutoTokenizer.from_pretrained(
        found.base.path, trust_remote_code=found.base.trust_remote_code
    ).save_pretrained(folder)
    if mtp:
        drafter: Any = found.drafter
        mtp_layers.append(folder, mtp_layers.tensors(drafter, merged, dtype), {})
    elif found.task.kind != "label":
        _keep_mtp(found.base, merged, folder)
    auto: Any = (
        AutoModelForSequenceClassification if found.task.kind == "label" else AutoModelForCausalLM
    )
    loaded, notes = auto.from_pretrained(
        folder,
        dtype=torch.float32,
        trust_remote_code=found.base.trust_remote_code,
        output_loading_info=True,
    )
    if notes["missing_keys"]:
        raise Mismatch(f"the export lacks {', '.join(sorted(notes['missing_keys'])[:5])}")
    loaded.eval()
    _cast(merged, torch.float32)
    rounded = _outputs(merged, found)
    _compare(rounded, _outputs(loaded, found))  # the folder holds exactly what was merged
    if mtp:
        _compare_mtp(found, merged, loaded, dtype)
    if dtype != torch.float32:
        agreement = float((wanted[-1].argmax(-1) == rounded[-1].argmax(-1)).float().mean())
        log.warning(
            "rounded to %s, the most likely token stays the same at %.1f %% of positions",
            str(dtype).removeprefix("torch."),
            100 * agreement,
        )
    return difference


def _keep_mtp(base: Base, merged: Any, folder: Path) -> None:
    """Copy the MTP layers in the base's files, which transformers has not loaded, into the
    folder."""
    place = Path(base.path)
    if not place.is_dir():
        try:
            place = Path(
                huggingface_hub.snapshot_download(
                    base.path,
                    revision=base.revision,
                    local_files_only=True,
                    allow_patterns=["*.safetensors", "*.json"],
                )
            )
        except LocalEntryNotFoundError:
            return
    extra, settings = mtp_layers.left_out(
        place, merged.config.get_text_config().num_hidden_layers, folder
    )
    if not extra:
        return
    if getattr(base.config, "quantization_config", None) is not None:
        log.warning(
            "the base's MTP layers (%d tensors) are quantised, and this export is not: they are"
            " left out",
            len(extra),
        )
        return
    mtp_layers.append(folder, extra, settings)
    log.warning(
        "the base's MTP layers (%d tensors) were copied as they are: they were trained for the"
        " base, and the adapter's model takes fewer of their tokens",
        len(extra),
    )


def _compare_mtp(found: Trained, merged: Any, loaded: Any, dtype: torch.dtype) -> None:
    """Hold what transformers' MTP layer says, loaded from the export, against the drafter with its
    weights rounded likewise."""
    ids = _rows(merged, found)
    drafter: Any = found.drafter
    _cast(drafter, dtype)
    _cast(drafter, torch.float32)
    wanted, got = (
        mtp_layers.own_logits(drafter, merged, ids),
        mtp_layers.transformers_logits(loaded, ids),
    )
    difference = _distance(wanted.float(), got.float())
    if not difference <= TOLERANCE:
        raise Mismatch(
            f"the MTP layer, loaded back, differs from the run's drafter by {difference:.3g} of the"
            f" logits' spread (at most {TOLERANCE:g})"
        )


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    # Parameters only: rotary frequencies are buffers, which a loaded model computes in fp32 again.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
