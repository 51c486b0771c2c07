"""A config of another trainer as an experiment file of conf/'s form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from trainer.config import limits, schema
from trainer.config.errors import ConfigError
from trainer.config.foreign import (
    AXOLOTL,
    LITGPT,
    LLAMA_FACTORY,
    NO,
    TORCHTUNE,
    TRL,
    Imported,
    Rule,
)
from trainer.config.groups import default_choices, root_schema
from trainer.config.overrides import groups

TABLES: dict[str, dict[str, Rule]] = {
    "axolotl": AXOLOTL,
    "llama-factory": LLAMA_FACTORY,
    "torchtune": TORCHTUNE,
    "litgpt": LITGPT,
    "trl": TRL,
}
NESTED = ("torchtune", "litgpt")  # their keys are dotted in the tables


def read(file: Path) -> dict[str, Any]:
    """Return the content of a YAML or JSON file.

    Raises:
        ConfigError: it is no mapping, too large, or damaged.
    """
    try:
        content = limits.load_yaml(file, unique=True)
    except (OSError, UnicodeDecodeError, limits.LimitExceeded, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{file} is no config: expected a mapping of settings")
    return {str(key): value for key, value in content.items()}


def kind_of(content: dict[str, Any]) -> str | None:
    """Return which trainer a config is for, None if that is not known."""
    if any("_component_" in value for value in content.values() if isinstance(value, dict)):
        return "torchtune"
    if "checkpoint_dir" in content and ("lora_r" in content or "train" in content):
        return "litgpt"
    if "finetuning_type" in content or "stage" in content:
        return "llama-factory"
    if "base_model" in content:
        return "axolotl"
    return "trl" if {"model_name_or_path", "peft_type"} & content.keys() else None


def convert(content: dict[str, Any], kind: str) -> Imported:
    """Apply a trainer's table to its config. Every key is carried, explained or unknown."""
    result, table = Imported(kind), TABLES[kind]
    for key, value in _entries(content, table, kind):
        rule = table.get(key, table.get(f"{key.partition('.')[0]}.*"))
        if rule is None:
            result.unknown.append(key)
        elif isinstance(rule, str) and rule.startswith(NO):
            result.explained[key] = rule.removeprefix(NO)
        elif value is None:
            result.explained[key] = "it is not set"
        else:
            settings = {rule: value} if isinstance(rule, str) else rule(value, content)
            if settings:
                result.carried[key] = settings
            elif value in (False, "", [], 0):
                result.explained[key] = "it is switched off, as here by default"
            else:
                result.explained[key] = f"{json.dumps(value, default=str)} has no counterpart here"
    _keep_valid(result)
    return result


def _entries(content: dict[str, Any], table: dict[str, Rule], kind: str) -> list[tuple[str, Any]]:
    entries: list[tuple[str, Any]] = []
    for key, value in content.items():
        if kind in NESTED and isinstance(value, dict) and key not in table:
            entries += [(f"{key}.{name}", item) for name, item in value.items()]
        else:
            entries.append((key, value))
    return entries


def _keep_valid(result: Imported) -> None:
    """Collect the settings, and move those that conf/ does not take to what is explained."""
    chosen = default_choices() | {"base": "hf", "logger": "none"}
    for settings in result.carried.values():
        chosen |= {key: value for key, value in settings.items() if key in groups()}
    root = root_schema(chosen)
    for key, settings in list(result.carried.items()):
        faults = [fault for each, value in settings.items()
                  if (fault := _fault(root, each, value)) is not None]  # fmt: skip
        if faults:
            del result.carried[key]
            result.explained[key] = "; ".join(faults)
        else:
            result.settings |= settings
    result.settings = {"base": "hf", "logger": "none"} | result.settings


def _fault(root: schema.Table, key: str, value: Any) -> str | None:
    if key in groups():
        known = schema.options(key)
        return None if value in known else f"{key} has {', '.join(known)}"
    node: Any = root
    for part in key.split("."):
        children = node.children if isinstance(node, schema.Table) else {}
        if part not in children:
            return f"{key} is no setting of what is chosen here"
        node = children[part]
    if isinstance(node, schema.Table) or schema.accepts(value, node.type):
        return None
    return f"{key} takes {node.type}, and it is {json.dumps(value, default=str)}"


def experiment(result: Imported, name: str) -> str:
    """Return the text of an experiment file."""
    chosen = {key: value for key, value in result.settings.items() if key in groups()}
    content: dict[str, Any] = {
        "defaults": [{f"override /{group}": choice} for group, choice in chosen.items()],
        "name": name,
    }
    for key, value in result.settings.items():
        if key in chosen:
            continue
        node, (*parents, leaf) = content, key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    if "path" not in content.get("task", {}):
        content.setdefault("task", {})["path"] = "???"
    lines = [f"# From a config of {result.source}."]
    lines += [f"# not carried: {key}: {' '.join(why.split())}"
              for key, why in result.explained.items()]  # fmt: skip
    lines += [f"# unknown: {key}" for key in result.unknown]
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return "# @package _global_\n" + "\n".join(lines) + "\n" + text
