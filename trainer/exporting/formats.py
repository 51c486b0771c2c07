"""Results for use elsewhere, loaded back before they count as written."""

from __future__ import annotations

from pathlib import Path

import torch

from adapters.delta import AdapterError
from trainer.assembly.trained import load_trained
from trainer.exporting import engines
from trainer.exporting.adapter import save_adapter, verify_adapter
from trainer.exporting.heads import _check_drafter, _write_drafter, _write_head
from trainer.exporting.merged import _write_merged
from trainer.storage import atomic
from trainer.storage.checkpoints import CheckpointError
from trainer.storage.progress import Progress


def export(
    run: str,
    to: str,
    out: Path | None,
    dtype: str,
    verifier: str | None = None,
    unembedding: str = "shared",
) -> tuple[Path, float]:
    """Write, load back, compare; returns the folder and the largest logit difference over the
    logits' spread.

    Raises:
        Mismatch: the loaded export differs; nothing is left behind.
        DrafterError: the run has no drafter, or one that is no MTP layer of its base's family or
        that the layout does not fit.
    """
    if to in ("drafter", "mtp", *engines.LAYOUTS):
        _check_drafter(run, to)
    with Progress(f"loading {run}"):
        found = load_trained(run, fp32=True, dequantise=to in ("merged", "mtp"))
    if to == "shira" and not hasattr(found.adapter, "save_pair"):
        raise AdapterError(
            "to=shira is for adapters with a sparse part, and this run's is"
            f" {type(found.adapter).__name__}: to=peft"
        )
    # The run has its own folder called drafter, of its last step.
    out = out or found.folder / (f"drafter-step-{found.step}" if to == "drafter" else to)
    if out.exists():
        raise CheckpointError(f"{out} exists. Remove it, or choose another place with out=FOLDER")
    with atomic.folder(out) as temporary, Progress(f"exporting to {out}"):
        if to == "drafter":
            difference = _write_drafter(found, temporary)
        elif to in engines.LAYOUTS:
            difference = _write_head(
                found, temporary, to, getattr(torch, dtype), verifier, unembedding == "copied"
            )
        elif to in ("peft", "shira"):
            save_adapter(
                found.adapter,
                found.model,
                found.base,
                found.task,
                temporary,
                pair=to == "shira",
            )
            difference = verify_adapter(found, temporary)
        else:
            difference = _write_merged(found, temporary, getattr(torch, dtype), mtp=to == "mtp")
    return out, difference
