"""Adapter folders of stock PEFT as the start of a run: what differs from the run's adapter, and
their tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from adapters.errors import AdapterError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def read_config(folder: Path) -> dict[str, Any]:
    """Return a folder's adapter_config.json.

    Raises:
        AdapterError: there is none, or it is no JSON object.
    """
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"adapter.from={folder}: {CONFIG} cannot be read: {error}. Give a run's folder, or a"
            " folder that stock PEFT saved"
        ) from None
    if not isinstance(config, dict):
        raise AdapterError(f"adapter.from={folder}: {CONFIG} is no JSON object")
    return config


def differences(
    settings: dict[str, Any], stored: dict[str, Any], names: dict[str, str]
) -> Iterator[str]:
    """Yield how a stored config differs from the settings. `names` are PEFT's names of the
    settings' keys. A field that is missing or null on one side and false or empty on the other is
    the same."""
    for key, theirs in names.items():
        mine, other = settings.get(key), stored.get(theirs)
        if (mine or None) != (other or None):
            yield f"adapter.{key}={_shown(mine)} here, {theirs}={_shown(other)} there"


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)


def refuse(folder: Path, faults: list[str]) -> None:
    """Raise AdapterError if there are faults."""
    if faults:
        raise AdapterError(
            f"adapter.from={folder} does not fit this run's adapter:\n  " + "\n  ".join(faults)
        )


def read_tensors(folder: Path, live: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a folder's tensors in the dtypes and on the devices of the run's, by PEFT's keys.

    Raises:
        AdapterError: the folder has other modules or shapes; the message names the first.
    """
    try:
        saved = load_file(folder / WEIGHTS)
    except Exception as error:  # safetensors has its own, and OSError
        raise AdapterError(f"adapter.from={folder}: {WEIGHTS} cannot be read: {error}") from None
    faults = [f"{key} is not there" for key in sorted(live.keys() - saved.keys())[:3]]
    faults += [
        f"{key} is there, and not trained here" for key in sorted(saved.keys() - live.keys())[:3]
    ]
    faults += [
        f"{key} is {list(saved[key].shape)} there and {list(live[key].shape)} here"
        for key in sorted(live.keys() & saved.keys())
        if saved[key].shape != live[key].shape
    ][:3]
    if faults:
        faults.append(
            "give the same adapter.target_modules, adapter.exclude_modules, adapter.train_modules"
            " and base.add_tokens"
        )
    refuse(folder, faults)
    return {key: saved[key].to(tensor.device, tensor.dtype) for key, tensor in live.items()}
