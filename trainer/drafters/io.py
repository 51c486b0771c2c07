"""Drafters as folders.

config.json         the settings, the target's sizes, and the base and adapter that the drafter was trained for
model.safetensors   its own weights; embedding and output head are the target's and not among them
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from trainer.checkpoint import write_text
from trainer.drafters import Drafter

FORMAT = 1


def save(drafter: Drafter, settings: dict[str, Any], target: dict[str, Any], folder: Path) -> None:
    """Write a drafter's folder. `settings` is its node of the config, `target` what it was trained for."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in drafter.state().items()}
    temporary = folder / "model.safetensors.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(folder / "model.safetensors")
    write_text(folder / "config.json", json.dumps({"format": FORMAT, "drafter": settings, "target": target}, indent=2) + "\n")
