"""Drafters as folders.

config.json         the settings, and what it was trained for: base, adapter and sizes of the target, and the run that trained it
model.safetensors   its own weights in fp32; embedding and output head are the target's and not among them
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.config import schema
from trainer.drafters import Drafter, DrafterError
from trainer.models.base import Base
from trainer.storage import atomic

FORMAT = 1
# Settings that say how a drafter is trained, and not what its weights mean. Where they change the
# weights' shapes those are refused.
_OF_TRAINING = {
    "offsets",
    "depth",
    "weights",
    "beta",
    "weight",
    "ramp",
    "loss",
    "eta",
    "lr_scale",
    "detach",
    "init",
    "noise",
    "feature_weight",
    "token_weight",
    "dropout",
    "train_head",
    "coverage",
    "confidence",
}


def save(drafter: Drafter, settings: dict[str, Any], target: dict[str, Any], folder: Path) -> None:
    """Write a drafter's folder. `settings` is its node of the config, `target` what it was trained
    for, as `trained_for` says it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in drafter.state().items()}
    with atomic.file(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    atomic.write_text(
        folder / "config.json",
        json.dumps({"format": FORMAT, "drafter": settings, "target": target}, indent=2) + "\n",
    )


def trained_for(base: Base, run: Path, step: int, adapter: dict[str, Any] | None) -> dict[str, Any]:
    """What a drafter's folder notes of its target. `adapter` says which run, step and checkpoint
    its adapter is of; None is the base alone."""
    sizes = base.config.get_text_config()
    return {
        "base": base.path,
        "fingerprint": base.fingerprint,
        "tokenizer": _digest(base.tokenizer),
        "adapter": adapter,
        "run": str(run),
        "step": step,
        "hidden_size": sizes.hidden_size,
        "vocab_size": sizes.vocab_size,
    }


def _digest(tokenizer: Any) -> str:
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def folder_of(path: str) -> Path:
    """A drafter's folder, given itself or the folder of the run that trained it.

    Raises:
        DrafterError: there is none.
    """
    place = Path(path).expanduser()
    run = (place / "run.yaml").exists()
    folder = place / "drafter" if run else place
    if not (folder / "config.json").exists():
        why = (
            "that run has no drafter, or has not ended yet"
            if run
            else "it is no drafter's folder: it has no config.json"
        )
        raise DrafterError(f"target.draft={path}: {why}")
    return folder


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings, what it was trained for) of a drafter's folder.

    Raises:
        DrafterError: the folder is not what `save` writes, or of another version.
    """
    content = _content(folder / "config.json")
    _check_settings(content["drafter"], folder / "config.json")
    return content["drafter"], content["target"]


def check(folder: Path, base: Base, settings: dict[str, Any] | None = None) -> None:
    """Refuse a folder whose drafter is not of this base, or was made with other `settings`, before
    anything is loaded.

    Raises:
        DrafterError: with what differs.
    """
    own, target = read(folder)
    _check_target(folder, target, base.config.get_text_config(), base.fingerprint)
    if target.get("tokenizer", digest := _digest(base.tokenizer)) != digest:
        raise DrafterError(
            f"{folder} was trained for the tokens of another tokenizer than {base.path} has"
        )
    wanted = own if settings is None else settings
    different = [
        f"drafter.{key}: {own.get(key)!r} there, {wanted.get(key)!r} here"
        for key in sorted(own.keys() | wanted.keys())
        if key not in _OF_TRAINING and own.get(key) != wanted.get(key)
    ]
    if different:
        raise DrafterError(f"{folder} is a drafter of other settings: {'; '.join(different)}")


def fill(drafter: Drafter, folder: Path) -> None:
    """Put a folder's weights into a drafter of the same settings.

    Raises:
        DrafterError: they do not fit it, are incomplete or not finite.
    """
    tensors = _tensors(folder / "model.safetensors")
    for tensor in drafter.state().values():
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)  # what is not loaded is seen
    drafter.load_state(tensors)
    spoilt = [name for name, tensor in drafter.state().items() if not torch.isfinite(tensor).all()]
    if spoilt:
        raise DrafterError(
            f"{folder / 'model.safetensors'} holds NaN or infinite values in"
            f" {', '.join(spoilt[:5])}"
        )


def load(folder: Path, model: Any, fingerprint: str | None = None) -> Drafter:
    """The drafter of a folder, made for a plain transformers model on that model's device, in eval
    mode. With the `fingerprint` of the model's base, a drafter of another base is refused; without
    it, only one whose sizes or tensors do not fit.

    A folder may come from a stranger: its settings are held against the files of conf/drafter, and
    nothing else is made.

    Raises:
        DrafterError: the folder is not what `save` writes, is not of this model, or its weights are
        incomplete or not finite.
    """
    settings, target = read(folder)
    _check_target(folder, target, model.config.get_text_config(), fingerprint)
    drafter: Drafter = get_class(settings["_target_"])(
        model=model,
        **{key: value for key, value in settings.items() if key not in schema.INSTANTIATE_KEYS},
    )
    fill(drafter, folder)
    return drafter.eval()


def _check_target(
    folder: Path, target: dict[str, Any], sizes: Any, fingerprint: str | None
) -> None:
    for name in ("hidden_size", "vocab_size"):
        if target.get(name) != (own := getattr(sizes, name)):
            raise DrafterError(
                f"{folder} is a drafter for {target.get('base')}, whose {name} is"
                f" {target.get(name)}; this model's is {own}"
            )
    if fingerprint is not None and target.get("fingerprint") != fingerprint:
        raise DrafterError(
            f"{folder} was trained for {target.get('base')}, and this base's weights are others"
        )


def _content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DrafterError(
            f"{file} cannot be read, so {file.parent} is no drafter's folder: {error}"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        written = content.get("format") if isinstance(content, dict) else None
        raise DrafterError(
            f"{file} is of the format {written!r}, and this version of Graft reads {FORMAT}"
        )
    if not all(isinstance(content.get(key), dict) for key in ("drafter", "target")):
        raise DrafterError(f"{file} has to hold the mappings drafter and target")
    return content


def _check_settings(settings: dict[str, Any], file: Path) -> None:
    tables = [
        table
        for name in schema.options("drafter")
        if (table := schema.load(f"drafter/{name}")).target
    ]
    made = settings.get("_target_")
    fitting = [table for table in tables if table.target == made]
    if not fitting:
        raise DrafterError(
            f"{file}: drafter._target_ is {made!r}. Only classes that conf/ names are instantiated: "
            f"{', '.join(sorted({str(table.target) for table in tables}))}"
        )
    if faults := schema.problems(settings, fitting[0], "drafter"):
        raise DrafterError(f"{file} does not fit this version of Graft:\n" + "\n".join(faults))


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise DrafterError(f"{file} cannot be read: {error}") from None
