"""The groups of conf/: their default files, and the schema of the composed config."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import yaml

from trainer.config import schema
from trainer.config.errors import ConfigError
from trainer.config.limits import LOADER


def root_schema(choices: dict[str, Any]) -> schema.Table:
    """Return the schema of the whole config for the file that each group uses.

    Raises:
        ConfigError: a group uses a file that is not in conf/.
    """
    root = schema.load("config")
    children = dict(root.children)
    for group in sorted(path.name for path in schema.CONF.iterdir() if any(path.glob("*.yaml"))):
        if group == "experiment":
            continue
        names, choice = schema.options(group), choices.get(group)
        if choice is not None and choice not in names:
            raise ConfigError(
                f"{group}={choice}: conf/{group} has {', '.join(names)}. To add one, put its file"
                " there"
            )
        # Hydra does not record the files of a list such as logger=[wandb,tensorboard]. Then the
        # schema has the keys of all files.
        tables = [
            schema.load(f"{group}/{name}") for name in ([choice] if choice is not None else names)
        ]
        if len({table.target for table in tables}) > 1:
            raise ConfigError(f"{group}: choose one of {', '.join(names)}")
        merged: dict[str, Any] = {}
        for table in tables:
            merged |= table.children
        children[group] = replace(tables[-1], children=merged)
    return schema.Table(children, None, root.file)


def default_choices() -> dict[str, str]:
    """Return the file that conf/config.yaml uses for each group."""
    text = (schema.CONF / "config.yaml").read_text("utf-8")
    return {
        group: name
        for entry in yaml.load(text, Loader=LOADER)["defaults"]
        if isinstance(entry, dict)
        for group, name in entry.items()
        if " " not in group
    }
