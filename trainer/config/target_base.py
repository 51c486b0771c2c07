"""The base of a target run, read from its folder before torch is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from trainer.config import history, limits, run_record

# settings of how the same weights are loaded and compute, which may differ from the target's
FREE = ("dtype", "attn_implementation", "trust_remote_code")


def split(path: str) -> tuple[Path, str]:
    """Split `FOLDER` or `FOLDER@last|best|STEP` into (folder, checkpoint), which is "" if the path
    names none."""
    name, _, which = path.rpartition("@")
    # the folder's name itself may hold an @
    if not name or (Path(path).expanduser() / "run.yaml").exists():
        return Path(path).expanduser(), ""
    return Path(name).expanduser(), which


def base_of(path: str) -> tuple[dict[str, Any], str]:
    """Return (config node, file of conf/base) of a run's base as run.yaml records them, unchecked.

    Raises:
        ValueError: the run has no adapter of a language model. The message names the fix.
    """
    folder, _ = split(path)
    file = folder / "run.yaml"
    try:
        content = limits.load_yaml(file)
        config, identity = content["config"], content["identity"]
        base, choice, adapter = (
            config["base"],
            identity["choices"]["base"],
            config["adapter"]["_target_"],
        )
        earlier = (config.get("target") or {}).get("run")
        classifies = identity["labels"] is not None
        history.rename(base)
    except FileNotFoundError:
        raise ValueError(
            f"target.run={path}: {folder} is no run folder: it has no run.yaml. Give the folder of"
            " a fine-tuning run"
        ) from None
    except (
        OSError,
        UnicodeDecodeError,
        limits.LimitExceeded,
        yaml.YAMLError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        fault = f"{file} is not a run's record: {run_record.reason(error)}"
        raise ValueError(f"target.run={path}: {fault}") from None
    if classifies:
        raise ValueError(
            f"target.run={path}: that run trained a classifier, which writes no text to draft"
        )
    if earlier is not None:
        raise ValueError(
            f"target.run={path}: that run trained a drafter, for {earlier}: give"
            f" target.run={earlier}, and target.draft={path} to start from its drafter"
        )
    if adapter == "adapters.full.Nothing":
        raise ValueError(
            f"target.run={path}: that run trained no adapter, so the target is the base alone:"
            " leave target.run out"
        )
    return base, choice


def other_base(path: str, theirs: dict[str, Any], requested: dict[str, Any]) -> str | None:
    """Return a message if the requested base differs from the base of the target run."""
    keys = [
        key
        for key in sorted(theirs.keys() | requested.keys())
        if key not in FREE and theirs.get(key) != requested.get(key)
    ]
    if not keys:
        return None
    return (
        f"target.run={path} was trained on {_name(theirs)}, and the requested base is"
        f" {_name(requested)} (base.{keys[0]}: {theirs.get(keys[0])!r} there,"
        f" {requested.get(keys[0])!r} here). Leave base out: the target run sets it"
    )


def _name(base: dict[str, Any]) -> str:
    return str(
        base.get("path") or base.get("member") or str(base.get("_target_")).rpartition(".")[2]
    )
