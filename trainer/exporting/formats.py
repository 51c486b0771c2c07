"""Results for use elsewhere, loaded back before they count as written."""

from __future__ import annotations

from pathlib import Path

import torch

from adapters.delta import AdapterError
from trainer.assembly.trained import Trained, load_trained
from trainer.exporting import card, engines, gguf_lora, gguf_model
from trainer.exporting.adapter import save_adapter, verify_adapter
from trainer.exporting.heads import check_drafter, write_drafter, write_gguf, write_head
from trainer.exporting.merged import write_merged
from trainer.exporting.serving import Serving
from trainer.storage import atomic, door
from trainer.storage.progress import Progress


def export(
    run: str,
    to: str,
    out: Path | None,
    dtype: str,
    verifier: str | None = None,
    unembedding: str = "shared",
) -> tuple[Path, float]:
    """Write, load back and compare. Return the folder and the logits' difference over their spread.

    Raises:
        Mismatch: the loaded export differs; nothing is left behind.
        DrafterError: the run has no drafter, or the drafter does not fit the format.
    """
    if to in ("drafter", "mtp", "gguf_draft", *engines.LAYOUTS):
        check_drafter(run, to)
    if out is not None:
        door.refuse_existing(out, "out=FOLDER")
    source = load_trained(run, fp32=True, dequantise=to in ("merged", "mtp", "gguf"))
    if to == "shira" and not hasattr(source.adapter, "save_pair"):
        raise AdapterError(
            "to=shira is for adapters with a sparse part, and this run's is"
            f" {type(source.adapter).__name__}: to=peft"
        )
    if to in ("merged", "mtp", "gguf"):
        source.adapter.refuse_merging()
    # The run's folder `drafter` holds that of its last step.
    out = out or source.folder / (f"drafter-step-{source.step}" if to == "drafter" else to)
    door.refuse_existing(out, "out=FOLDER")
    with atomic.folder(out) as temporary, Progress(f"exporting to {out}"):
        copied = unembedding == "copied"
        difference = _write(source, to, temporary, dtype, verifier, copied)
        card.write(temporary, to, source.folder, difference, source.step)
    return out, difference


def _write(
    run: Trained, to: str, folder: Path, type_: str, verifier: str | None, copied: bool
) -> float:
    if to == "gguf":
        return gguf_model.write_gguf(run, folder, type_)
    if to == "gguf_lora":
        return gguf_lora.write_gguf_lora(run, folder)
    if to == "gguf_draft":
        return write_gguf(run, folder, type_)
    dtype: torch.dtype = getattr(torch, type_)
    if to == "drafter":
        return write_drafter(run, folder)
    if to in engines.LAYOUTS:
        return write_head(run, folder, to, dtype, verifier, copied)
    if to in ("peft", "shira"):
        Serving.of(run).write(folder, run.model)
        save_adapter(run.adapter, run.model, run.base, run.task, folder, pair=to == "shira")
        return verify_adapter(run, folder)
    return write_merged(run, folder, dtype, mtp=to == "mtp")
