"""Drafters as folders.

config.json         the settings, and the target it was trained for: base, adapter, sizes and run
model.safetensors   the drafter's own weights in fp32, without the target's embedding and head
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.config import files, history, paths, schema
from trainer.drafters import Drafter, DrafterError
from trainer.drafters.families import kind_of
from trainer.models.base import Base
from trainer.storage import atomic, door

FORMAT = 1
# Settings of training, which do not change the meaning of the weights. Weights whose shapes they
# change are refused.
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
    "topk",
    "anchors",
    "decay",
    "ce",
    "l1",
    "topk_weight",
    "dropout",
    "train_head",
    "coverage",
    "confidence",
    "keep",
    "keep_least",
}


def save(drafter: Drafter, settings: dict[str, Any], target: dict[str, Any], folder: Path) -> None:
    """Write a drafter's folder. `settings` is its node of the config, `target` the result of
    `trained_for`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in drafter.state().items()}
    with atomic.file(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    atomic.write_text(
        folder / "config.json",
        json.dumps({"format": FORMAT, "drafter": settings, "target": target}, indent=2) + "\n",
    )


def copy(source: Path, folder: Path) -> None:
    """Copy a drafter's folder: its weights first, then its settings, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "config.json"):
        with atomic.file(folder / name) as temporary:
            shutil.copyfile(source / name, temporary)


def trained_for(base: Base, run: Path, step: int, adapter: dict[str, Any] | None) -> dict[str, Any]:
    """Describe a drafter's target for its folder. `adapter` gives run, step and checkpoint of the
    target's adapter; None is the base alone."""
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
    """Return a drafter's folder, given that folder or the one of the run that trained it.

    Raises:
        DrafterError: there is none.
    """
    folder, fault = paths.drafter_folder(path)
    if fault is not None:
        raise DrafterError(f"target.draft={path}: {fault}")
    return folder


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (settings, description of the target) of a drafter's folder.

    Raises:
        DrafterError: the folder was not written by `save`, or by another version.
    """
    try:
        door.refuse_devices(folder)
    except door.FolderError as error:
        raise DrafterError(str(error)) from None
    content = _content(folder / "config.json")
    history.keep_head(content["drafter"])
    _check_settings(content["drafter"], folder / "config.json")
    return content["drafter"], content["target"]


def check(folder: Path, base: Base, settings: dict[str, Any] | None = None) -> None:
    """Refuse a folder whose drafter is of another base, or has other `settings`, before anything is
    loaded.

    Raises:
        DrafterError: the message says what differs.
    """
    stored, target = read(folder)
    _check_target(folder, target, base.config.get_text_config(), base.fingerprint)
    if target.get("tokenizer", digest := _digest(base.tokenizer)) != digest:
        raise DrafterError(
            f"{folder} was trained for another tokenizer than that of {base.path}: give the base"
            " that it was trained for"
        )
    expected = stored if settings is None else settings
    stored, expected = (_with_layer(some, base) for some in (stored, expected))
    different = [
        f"drafter.{key}: {stored.get(key)!r} there, {expected.get(key)!r} here"
        for key in sorted(stored.keys() | expected.keys())
        if key not in _OF_TRAINING and stored.get(key) != expected.get(key)
    ]
    if different:
        raise DrafterError(
            f"{folder} is a drafter of other settings: {'; '.join(different)}. Set the same ones"
        )


def _with_layer(settings: dict[str, Any], base: Base) -> dict[str, Any]:
    """Return a drafter's settings with the layer that `auto` stands for on a base."""
    if "layer" not in settings:
        return settings
    drafter: Any = get_class(settings["_target_"])
    biased = drafter.keeps_biases
    kind = kind_of(settings["layer"], base.config.get_text_config(), biased)
    return settings | {"layer": kind}


def fill(drafter: Drafter, folder: Path) -> None:
    """Load a folder's weights into a drafter of the same settings.

    Raises:
        DrafterError: they do not fit it, are incomplete or not finite.
    """
    tensors = _tensors(folder / "model.safetensors")
    for tensor in drafter.state().values():
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)  # so that a tensor that is not loaded is noticed
    drafter.load_state(tensors)
    not_finite = [
        name for name, tensor in drafter.state().items() if not torch.isfinite(tensor).all()
    ]
    if not_finite:
        raise DrafterError(
            f"{folder / 'model.safetensors'} holds NaN or infinite values in"
            f" {', '.join(not_finite[:5])}: restore the folder, or train the drafter again"
        )


def load(folder: Path | str, model: Any, fingerprint: str | None = None) -> Drafter:
    """Load the drafter of a folder for a plain transformers model, on that model's device, in eval
    mode. With the `fingerprint` of the model's base, a drafter of another base is refused; without
    it, only one whose sizes or tensors do not fit.

    The folder may come from a stranger: its settings are checked against the files of conf/drafter,
    and no other class is built.

    Raises:
        DrafterError: the folder was not written by `save`, is for another model, or its weights are
        incomplete or not finite.
    """
    folder = Path(folder).expanduser()
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
        if target.get(name) != (size := getattr(sizes, name)):
            raise DrafterError(
                f"{folder} is a drafter for {target.get('base')}, whose {name} is"
                f" {target.get(name)}; this model's is {size}"
            )
    if fingerprint is not None and target.get("fingerprint") != fingerprint:
        raise DrafterError(
            f"{folder} was trained for {target.get('base')}, and this base has other"
            " weights: give that base, or train a drafter for this one"
        )


def _content(file: Path) -> dict[str, Any]:
    try:
        content = door.parse(files.read_text(file, door.JSON_BYTES))
    except (OSError, ValueError) as error:
        raise DrafterError(
            f"{file} cannot be read, so {file.parent} is no drafter's folder: {error}"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        written = content.get("format") if isinstance(content, dict) else None
        raise DrafterError(
            f"{file} has the format {written!r}, and this version of Graft reads {FORMAT}"
        )
    if not all(isinstance(content.get(key), dict) for key in ("drafter", "target")):
        raise DrafterError(f"{file} must hold the mappings drafter and target")
    return content


def _check_settings(settings: dict[str, Any], file: Path) -> None:
    tables = [
        table
        for name in schema.options("drafter")
        if (table := schema.load(f"drafter/{name}")).target
    ]
    target = settings.get("_target_")
    fitting = [table for table in tables if table.target == target]
    if not fitting:
        raise DrafterError(
            f"{file}: drafter._target_ is {target!r}. Only classes that conf/ names are"
            f" instantiated: {', '.join(sorted({str(table.target) for table in tables}))}"
        )
    if faults := schema.problems(settings, fitting[0], "drafter"):
        raise DrafterError(f"{file} does not fit this version of Graft:\n" + "\n".join(faults))


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise DrafterError(f"{file} cannot be read: {error}") from None
