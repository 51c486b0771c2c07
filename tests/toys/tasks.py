"""Tasks made without composing a config: from their files of conf/task, or from plain settings."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from tests.conftest import ROOT
from trainer.assembly.build import instantiate

# of every task's constructor
SPLITS: dict[str, Any] = {
    "split": "train",
    "eval_path": None,
    "eval_split": "test",
    "eval_fraction": 0.0,
    "limit": None,
    "eval_limit": None,
    "on_bad": "raise",
    "weight_column": None,
}
CHATS: dict[str, Any] = SPLITS | {
    "columns": {},
    "system": None,
    "chat_template": None,
    "on_lost": "error",
    "chat_template_kwargs": {},
}
SFT: dict[str, Any] = CHATS | {
    "format": "auto",
    "train_on": "all",
    "metric": "exact_match",
    "streaming": False,
    "shuffle_block": 10,
}


def task_of(name, file, **more):
    """Return the task of a file of rows. `more` are settings of it."""
    config = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "task" / f"{name}.yaml"))
    for inherited in config.pop("defaults", []):
        if inherited != "_self_":
            below = OmegaConf.load(ROOT / "conf" / "task" / f"{inherited}.yaml")
            config = OmegaConf.to_container(below) | config
    where = {"parts": {"a": {"path": str(file)}}} if "parts" in config else {"path": str(file)}
    config |= where | {"eval_fraction": 0, "eval_path": None} if "parts" not in config else where
    labels = {"labels": ["x", "y"]} if name in ("classification", "multi_label") else {}
    config |= {"eval_fraction": 0} | labels | more
    return instantiate(config)
