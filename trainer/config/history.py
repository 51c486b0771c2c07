"""Configs that older versions recorded: complete them, and map what moved."""

from __future__ import annotations

from typing import Any

from trainer.config import schema
from trainer.config.errors import ConfigError
from trainer.config.groups import root_schema, usual


def complete(plain: dict[str, Any], choices: dict[str, Any]) -> list[str]:
    """Give a config that an older version recorded, in place, what has come since: keys as the
    files have them that its groups took, groups as conf/config.yaml takes them. Returns the dotted
    places. `check` refuses what is missing still."""
    for group, name in usual().items():
        if group not in plain:
            choices.setdefault(group, name)
    try:
        known = root_schema(choices)
    except ConfigError:  # which `check` raises again
        return []
    return schema.complete(plain, known)
