"""Configs that older versions recorded: add missing keys, and map moved classes.

A recorded config gets today's names, and is then checked like a new one. To move a class that conf/
names, add a line to MOVED.
"""

from __future__ import annotations

from typing import Any

from trainer.config import schema
from trainer.config.errors import ConfigError
from trainer.config.groups import default_choices, root_schema

# `_target_` names that older versions recorded -> the names of the same classes today
MOVED = {
    "trainer.base.from_hub": "trainer.models.hub.from_hub",
    "trainer.base.from_wheel": "trainer.models.gguf.from_wheel",
    "trainer.base.tiny": "trainer.models.tiny.tiny",
    "trainer.finetune.FineTune": "trainer.training.finetune.FineTune",
    "trainer.distill.Distill": "trainer.training.distill.Distill",
}


def rename(node: Any) -> None:
    """Replace the `_target_` names in a recorded config by today's, in place."""
    if isinstance(node, dict):
        if isinstance(name := node.get("_target_"), str):
            node["_target_"] = MOVED.get(name, name)
        for value in node.values():
            rename(value)
    elif isinstance(node, list):
        for value in node:
            rename(value)


def complete(plain: dict[str, Any], choices: dict[str, Any]) -> list[str]:
    """Add to a recorded config, in place, the keys that are new since. Return their dotted names.

    A new key gets the value in its group's file, a new group the file that conf/config.yaml uses.
    Moved classes get their new names. `compose.check` refuses what is missing then.
    """
    rename(plain)
    for group, name in default_choices().items():
        if group not in plain:
            choices.setdefault(group, name)
    try:
        table = root_schema(choices)
    except ConfigError:  # `compose.check` raises it again, with the file's name
        return []
    return schema.complete(plain, table)
