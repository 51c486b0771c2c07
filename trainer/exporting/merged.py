"""Merged models in transformers' format."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn
from transformers import AutoModelForSequenceClassification

from adapters.full import Full
from trainer.assembly.trained import Trained
from trainer.exporting import mtp_layers
from trainer.exporting.compare import (
    TOLERANCE,
    Mismatch,
    compare,
    distance,
    effect,
    outputs,
    random_rows,
)
from trainer.exporting.serving import Serving
from trainer.models.base import Base
from trainer.models.folders import text_model_class

log = logging.getLogger("trainer")
PRUNED = 0.05  # share of zeros from which a base counts as pruned; random weights have none
PRUNED_TOO = 0.3  # the same of a quantised base: 4 bits round 6 to 10 % of random weights to zero


@torch.no_grad()
def write_merged(run: Trained, folder: Path, dtype: torch.dtype, mtp: bool) -> float:
    """Write the run's model with its adapter merged, load it back and compare. Return the distance
    of merged and unmerged logits.

    With `mtp` the drafter is added as the MTP layer of the base's family.

    Raises:
        Mismatch: the merged or the loaded model differs.
        DrafterError: the drafter is no MTP layer of the base's family.
    """
    expected = outputs(run.model, run)
    moved, before = None, None
    if not isinstance(run.adapter, Full):  # which changes the base itself
        with run.adapter.disabled(run.model):
            moved = effect(expected[-1], outputs(run.model, run)[-1])
            before = zeros(run.model)
    merged: Any = run.adapter.merge(run.model)
    if before is not None:
        quantised = run.base.quantization != "none" or run.base.is_quantized
        within = getattr(run.adapter, "within", "all")
        report_filled(before, zeros(merged), within, PRUNED_TOO if quantised else PRUNED)
    difference = compare(expected, outputs(merged, run), moved)
    if mtp:
        mtp_layers.check(run.drafter, merged)
    cast_parameters(merged, dtype)
    merged.config.dtype = dtype
    serving = Serving.of(run)
    if run.task.kind != "label":
        serving.set_ends(merged)
    merged.save_pretrained(folder)
    serving.write(folder, merged)
    if mtp:
        drafter: Any = run.drafter
        mtp_layers.append(folder, mtp_layers.tensors(drafter, merged, dtype), {})
    elif run.task.kind != "label" and run.base.decoder_start is None:
        _keep_mtp(run.base, merged, folder)
    loaded = _load(run, folder)
    cast_parameters(merged, torch.float32)
    rounded = outputs(merged, run)
    compare(rounded, outputs(loaded, run), moved)  # the folder holds exactly the merged weights
    if mtp:
        _compare_mtp(run, merged, loaded, dtype)
    if dtype != torch.float32:
        agreement = float((expected[-1].argmax(-1) == rounded[-1].argmax(-1)).float().mean())
        log.warning(
            "rounded to %s, the most likely token stays the same at %.1f %% of positions",
            str(dtype).removeprefix("torch."),
            100 * agreement,
        )
    return difference


def zeros(model: nn.Module) -> tuple[int, int]:
    """Return (zeros, entries) of a model's frozen matrices."""
    matrices = [p for p in model.parameters() if p.ndim == 2 and p.is_floating_point()]
    frozen = [p for p in matrices if not p.requires_grad]
    return sum(int((p == 0).sum()) for p in frozen), sum(p.numel() for p in frozen)


def report_filled(
    before: tuple[int, int], after: tuple[int, int], within: str, least: float
) -> None:
    """Warn if a merged adapter has filled the zeros of a pruned base, one with a share of `least`.

    Raises:
        Mismatch: the adapter was to keep them.
    """
    (count, entries), filled = before, before[0] - after[0]
    if count < least * entries or filled <= 0:
        return
    if within == "nonzero":
        raise Mismatch(f"{filled} zeros of the base are filled, despite adapter.within=nonzero")
    log.warning(
        "the base is pruned (%.0f %% of its weights are zero), and merging fills %.0f %% of its"
        " zeros: the pattern is lost. Keep the adapter unmerged (to=peft), or train one that keeps"
        " zeros: adapter=rosa, sparse or spiel with adapter.within=nonzero",
        100 * count / entries,
        100 * filled / count,
    )


def _load(run: Trained, folder: Path) -> Any:
    auto: Any = (
        AutoModelForSequenceClassification
        if run.task.kind == "label"
        else text_model_class(run.base.config)
    )
    loaded, info = auto.from_pretrained(
        folder,
        dtype=torch.float32,
        trust_remote_code=run.base.trust_remote_code,
        output_loading_info=True,
    )
    if info["missing_keys"]:
        raise Mismatch(f"the export lacks {', '.join(sorted(info['missing_keys'])[:5])}")
    layers = run.base.config.get_text_config().num_hidden_layers
    if unread := sorted(
        name for name in info["unexpected_keys"] if not mtp_layers.is_mtp(name, layers)
    ):
        raise Mismatch(
            f"transformers does not read {len(unread)} tensors of the export, such as {unread[0]}"
        )
    return loaded.eval()


def _keep_mtp(base: Base, merged: Any, folder: Path) -> None:
    """Copy the MTP layers of the base's files, which transformers has not loaded, into the
    folder."""
    source = Path(base.path)
    if not source.is_dir():
        try:
            source = Path(
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
        source, merged.config.get_text_config().num_hidden_layers, folder
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
        " base, so the model with the adapter accepts fewer of their tokens",
        len(extra),
    )


def _compare_mtp(run: Trained, merged: Any, loaded: Any, dtype: torch.dtype) -> None:
    """Compare transformers' MTP layer, loaded from the export, with the drafter, its weights
    rounded in the same way."""
    ids = random_rows(merged, run)
    drafter: Any = run.drafter
    cast_parameters(drafter, dtype)
    cast_parameters(drafter, torch.float32)
    expected = mtp_layers.own_logits(drafter, merged, ids)
    difference = distance(expected.float(), mtp_layers.transformers_logits(loaded, ids).float())
    if not difference <= TOLERANCE:
        raise Mismatch(
            f"the MTP layer, loaded back, differs from the run's drafter by {difference:.3g} of the"
            f" logits' spread (at most {TOLERANCE:g})"
        )


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters in place, and no buffers: rotary frequencies are buffers, which a loaded
    model computes in fp32 again."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
