"""Configs that older versions recorded: complete them, and map what moved.

A recorded config is read with the names of today, and then checked as a new one is. To move a class
of conf/, add a line to MOVED.
"""

from __future__ import annotations

from typing import Any

from trainer.config import schema
from trainer.config.errors import ConfigError
from trainer.config.groups import default_choices, root_schema

# The names that older versions recorded as `_target_`, and those of the same classes today.
MOVED = {
    "trainer.base.from_hub": "trainer.models.hub.from_hub",
    "trainer.base.from_wheel": "trainer.models.gguf.from_wheel",
    "trainer.base.tiny": "trainer.models.tiny.tiny",
    "trainer.finetune.FineTune": "trainer.training.finetune.FineTune",
    "trainer.distill.Distill": "trainer.training.distill.Distill",
}


def rename(node: Any) -> None:
    """Replace the `_target_` names in a recorded config by those of today, in place."""
    if isinstance(node, dict):
        if isinstance(name := node.get("_target_"), str):
            node["_target_"] = MOVED.get(name, name)
        for value in node.values():
            rename(value)
    elif isinstance(node, list):
        for value in node:
            rename(value)


def complete(plain: dict[str, Any], choices: dict[str, Any]) -> list[str]:
    """Give a config that an older version recorded, in place, what was added since, and return the
    dotted places.

    Keys get the values of the files that the groups took, and groups the files that
    conf/config.yaml takes. Moved classes get their names of today. `check` refuses what is still
    missing."""
    rename(plain)
    for group, name in default_choices().items():
        if group not in plain:
            choices.setdefault(group, name)
    try:
        known = root_schema(choices)
    except ConfigError:  # which `check` raises again
        return []
    return schema.complete(plain, known)
