"""The drafter of a config, and the head that a LoRA on it starts from.

RUN/start_head/    that head, as trainer.drafters.io writes it. Checkpoints of the run hold the
                   LoRA alone, so the folder is needed to resume it and to load its head.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.assembly.build import instantiate
from trainer.drafters import Drafter, head_lora, io

FOLDER = "start_head"


def make(config: dict[str, Any], model: Any, source: Path | None) -> Drafter:
    """Make the drafter of a config for a model. With drafter_adapter=lora it gets the weights of
    the folder `source` and a LoRA; None is a head that the base brings, or a model without weights.

    Raises:
        DrafterError: the drafter does not fit the model or the folder, or has no linear layer.
    """
    drafter: Drafter = instantiate(config["drafter"])(model=model)
    if config["drafter_adapter"]:
        if source is not None:
            io.fill(drafter, source)
        head_lora.attach(drafter, model, **config["drafter_adapter"])
    return drafter


def source_of(config: dict[str, Any], run: Path | None) -> Path | None:
    """Return the folder of the head that a run's LoRA starts from. `run` is the run's folder, None
    before its first step. Without a LoRA, and for a head that the base brings, there is none."""
    if not config["drafter_adapter"] or config["target"]["draft"] is None:
        return None
    if run is not None and (run / FOLDER / "config.json").exists():
        return run / FOLDER
    if run is not None and config["branch"]:
        return Path(config["branch"]["run"]).expanduser() / FOLDER
    return io.folder_of(config["target"]["draft"])


def keep(source: Path, run: Path) -> None:
    """Copy the head that a run's LoRA starts from into the run's folder, unless it is there."""
    if not (run / FOLDER / "config.json").exists():
        io.copy(source, run / FOLDER)
