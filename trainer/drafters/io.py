"""Drafters as folders.

config.json         the settings, the target's sizes, and the base and run that the drafter was trained for
model.safetensors   its own weights in fp32; embedding and output head are the target's and not among them
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer import schema
from trainer.base import Base
from trainer.checkpoint import write_text
from trainer.drafters import Drafter, DrafterError

FORMAT = 1


def save(drafter: Drafter, settings: dict[str, Any], target: dict[str, Any], folder: Path) -> None:
    """Write a drafter's folder. `settings` is its node of the config, `target` what it was trained for, as `trained_for` says it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in drafter.state().items()}
    temporary = folder / "model.safetensors.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(folder / "model.safetensors")
    write_text(folder / "config.json", json.dumps({"format": FORMAT, "drafter": settings, "target": target}, indent=2) + "\n")


def trained_for(base: Base, run: Path, step: int) -> dict[str, Any]:
    """What a drafter's folder notes of its target."""
    sizes = base.config.get_text_config()
    return {
        "base": base.path, "fingerprint": base.fingerprint, "run": str(run), "step": step,
        "hidden_size": sizes.hidden_size, "vocab_size": sizes.vocab_size,
    }  # fmt: skip


def load(folder: Path, model: Any, fingerprint: str | None = None) -> Drafter:
    """The drafter of a folder, made for a plain transformers model on that model's device, in eval mode. With the `fingerprint`
    of the model's base, a drafter of another base is refused; without it, only one whose sizes or tensors do not fit.

    A folder may come from a stranger: its settings are held against the files of conf/drafter, and nothing else is made.

    Raises:
        DrafterError: the folder is not what `save` writes, is not of this model, or its weights are incomplete or not finite.
    """
    content = _content(folder / "config.json")
    settings, target = content["drafter"], content["target"]
    _check_settings(settings, folder / "config.json")
    sizes = model.config.get_text_config()
    for name in ("hidden_size", "vocab_size"):
        if target.get(name) != (own := getattr(sizes, name)):
            raise DrafterError(
                f"{folder} is a drafter for {target.get('base')}, whose {name} is {target.get(name)}; this model's is {own}"
            )
    if fingerprint is not None and target.get("fingerprint") != fingerprint:
        raise DrafterError(f"{folder} was trained for {target.get('base')}, and this base's weights are others")
    tensors = _tensors(folder / "model.safetensors")
    drafter: Drafter = get_class(settings["_target_"])(
        model=model, **{key: value for key, value in settings.items() if key not in schema.INSTANTIATE_KEYS}
    )
    for tensor in drafter.state().values():
        tensor.fill_(torch.nan)  # what is not loaded is seen
    drafter.load_state(tensors)
    spoilt = [name for name, tensor in drafter.state().items() if not torch.isfinite(tensor).all()]
    if spoilt:
        raise DrafterError(f"{folder / 'model.safetensors'} holds NaN or infinite values in {', '.join(spoilt[:5])}")
    return drafter.eval()


def _content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DrafterError(f"{file} cannot be read, so {file.parent} is no drafter's folder: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        written = content.get("format") if isinstance(content, dict) else None
        raise DrafterError(f"{file} is of the format {written!r}, and this version of Graft reads {FORMAT}")
    if not all(isinstance(content.get(key), dict) for key in ("drafter", "target")):
        raise DrafterError(f"{file} has to hold the mappings drafter and target")
    return content


def _check_settings(settings: dict[str, Any], file: Path) -> None:
    tables = [table for name in schema.options("drafter") if (table := schema.load(f"drafter/{name}")).target]
    made = settings.get("_target_")
    fitting = [table for table in tables if table.target == made]
    if not fitting:
        raise DrafterError(
            f"{file}: drafter._target_ is {made!r}. Only what the files of conf/ name may be made: "
            f"{', '.join(sorted({str(table.target) for table in tables}))}"
        )
    if faults := schema.problems(settings, fitting[0], "drafter"):
        raise DrafterError(f"{file} does not fit this version of Graft:\n" + "\n".join(faults))


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise DrafterError(f"{file} cannot be read: {error}") from None
