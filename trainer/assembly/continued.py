"""`adapter.from`: a new run that starts from the adapter of an earlier one, or of stock PEFT.

Weights are taken over. The optimiser, the schedule, the order of rows and the random numbers are
those of a new run.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn

from adapters import stock
from adapters.delta import Adapter, Start
from trainer.assembly.trained import load_tuned
from trainer.config.target_base import split
from trainer.models.base import Base
from trainer.storage import run_folder

log = logging.getLogger("trainer")

# Settings that decide which tensors an adapter has, or their meaning.
NEW = {"within": "all"}  # what runs without this setting have
SHAPES = (
    "_target_",
    "peft_type",
    "rank",
    "r",
    "alpha",
    "lora_alpha",
    "experts",
    "top",
    "pool_rank",
    "private_rank",
    "shards",
    "rslora",
    "use_rslora",
    "use_dora",
    "variant",
    "density",
    "density_pattern",
    "target_modules",
    "exclude_modules",
    "train_modules",
    "modules_to_save",
    "init_lora_weights",
    "dtype",
    "sparse_dtype",
    "within",
)


def check(config: dict[str, Any], base: Base, adapter: Adapter) -> None:
    """Compare the folder of `adapter.from` with the run's settings, without its weights.

    Raises:
        AdapterError: it is another method, has other sizes or another base.
        FolderError: the run's folder cannot be read.
    """
    path = config["adapter"].get("from")
    folder = split(path)[0] if path is not None else None
    # A run that is resumed does not read it again, and it may be gone.
    if path is None or (config["resume"] != "never" and folder and not folder.exists()):
        return
    if not is_run(path):
        folder = Path(path).expanduser()
        stored = stock.read_config(folder)
        faults = [*adapter.stock_faults(config["adapter"], stored), *_other_base(stored, base)]
        stock.refuse(folder, faults)
        return
    _, content, _ = run_folder.read(path)
    theirs, mine = content["config"]["adapter"], config["adapter"]
    faults = [
        f"adapter.{key}={mine.get(key)} here, {theirs.get(key)} there"
        for key in SHAPES
        if (mine.get(key, NEW.get(key)) or None) != (theirs.get(key, NEW.get(key)) or None)
    ]
    if content["identity"]["base"] != base.fingerprint:
        faults.append(
            f"base={base.path} here, {content['config']['base'].get('path', 'another base')} there:"
            " the weights of the base differ"
        )
    tokens = content["config"]["base"].get("add_tokens") or []
    if list(tokens) != list(base.add_tokens):
        faults.append(f"base.add_tokens={list(base.add_tokens)} here, {list(tokens)} there")
    stock.refuse(Path(path), faults)
    adapter.refuse_continuing()


def is_run(path: str) -> bool:
    """Return whether `FOLDER` or `FOLDER@last|best|STEP` is a run's."""
    return (split(path)[0] / "run.yaml").exists()


def attach(config: dict[str, Any], adapter: Adapter, model: nn.Module, start: Start) -> nn.Module:
    """Attach the run's adapter, in a new run with `adapter.from` with the weights from there.

    Raises:
        AdapterError, FolderError, UnusableCheckpoint: they do not fit, or cannot be read.
    """
    path = config["adapter"].get("from")
    if path is None or start.saved is not None:
        return adapter.attach(model, start)
    if is_run(path):
        tuned = load_tuned(path)
        model = adapter.attach_continued(model, start, tuned.saved)
        log.info("adapter: continues %s after step %d", path, tuned.record["step"])
        return model
    model = adapter.attach(model, start)
    adapter.load_stock_folder(model, Path(path).expanduser())
    log.info("adapter: continues the adapter of %s", path)
    return model


def _other_base(stored: dict[str, Any], base: Base) -> list[str]:
    """Return whether a PEFT folder names another base, as far as names and local folders tell."""
    name = stored.get("base_model_name_or_path")
    if not name or name == base.path:
        return []
    if Path(name).is_dir():
        same = Base(name, "auto", "sdpa", "none", True).fingerprint == base.fingerprint
    else:
        # A folder of another machine cannot be compared; two names of the hub can.
        same = Path(base.path).is_dir() or name.count("/") > 1
    return [] if same else [f"base={base.path} here, base_model_name_or_path={name} there"]
