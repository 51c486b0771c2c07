"""conf/ as JSON Schema (draft 2020-12), for editors: of one file, of a group, of an experiment.

An editor that knows it completes keys and choices, shows each key's text, and marks what
`trainer.config.schema` would refuse. A value may also be an interpolation, `${...}`.
"""

from __future__ import annotations

import re
from typing import Any

from trainer.config import schema
from trainer.config.groups import default_choices
from trainer.config.overrides import groups
from trainer.config.schema import Leaf, Table

DRAFT = "https://json-schema.org/draft/2020-12/schema"
INTERPOLATION = {"type": "string", "pattern": r"\$\{"}
_TYPES = {"int": "integer", "float": "number", "str": "string", "bool": "boolean"}
_BOUNDS = {">=": "minimum", ">": "exclusiveMinimum", "<=": "maximum", "<": "exclusiveMaximum"}


def of(name: str) -> dict[str, Any]:
    """Return the schema of `experiment`, of a group such as `adapter`, or of a file such as
    `adapter/lora`.

    Raises:
        ValueError: conf/ has no such group or file.
    """
    group, _, choice = name.partition("/")
    if name == "experiment":
        content = _experiment()
    elif choice and choice in schema.options(group):
        content = _table(schema.load(name))
    elif not choice and group in groups():
        content = _group(group)
    else:
        known = [*groups(), *(f"{group}/{each}" for each in schema.options(group))]
        raise ValueError(f"conf/ has no {name}. {schema.nearest(name, known)}")
    return {"$schema": DRAFT, "title": f"Graft: {name}"} | content


def names() -> list[str]:
    """Return what `of` takes."""
    own = [group for group in groups() if group != "experiment"]
    files = [f"{group}/{choice}" for group in own for choice in schema.options(group)]
    return ["experiment", *own, *files]


def _experiment() -> dict[str, Any]:
    """An experiment changes any settings, and chooses files in its defaults list."""
    own = [group for group in groups() if group != "experiment"]
    root = _table(schema.load("config"))["properties"]
    nodes = {group: _group(group) for group in own}
    choices = [
        {
            "type": "object",
            "properties": {
                f"override /{group}": _any([
                    {"enum": schema.options(group)},
                    {"type": "array", "items": {"enum": schema.options(group)}},
                ])
            },
            "required": [f"override /{group}"],
            "additionalProperties": False,
        }
        for group in own
    ]  # fmt: skip
    hydra = {
        "type": "object",
        "properties": {"override /hydra/launcher": {"type": "string"}},
        "required": ["override /hydra/launcher"],
        "additionalProperties": False,
    }
    defaults = {"type": "array", "items": _any([{"type": "string"}, hydra, *choices])}
    return {
        "type": "object",
        "properties": root | nodes | {"defaults": defaults, "hydra": {"type": "object"}},
        "additionalProperties": False,
    }


def _group(group: str) -> dict[str, Any]:
    """The keys of all files of a group. A key of several files takes what one of them takes."""
    parts: dict[str, list[Any]] = {}
    first = default_choices().get(group)
    order = sorted(schema.options(group), key=lambda choice: choice != first)
    tables = [schema.load(f"{group}/{choice}") for choice in order]
    for table in tables:
        for key, part in _table(table)["properties"].items():
            known = parts.setdefault(key, [])
            if part not in known:
                known.append(part)
    return {
        "type": "object",
        "properties": {key: _any(each) for key, each in parts.items()},
        "additionalProperties": any(table.open for table in tables),
    }


def _table(table: Table) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            key: _leaf(child) if isinstance(child, Leaf) else _nullable(_table(child))
            for key, child in table.children.items()
        }
        | ({"_target_": {"const": table.target}} if table.target else {})
        | ({"_partial_": {"const": True}} if table.partial else {}),
        "additionalProperties": table.open,
    }


def _nullable(content: dict[str, Any]) -> dict[str, Any]:
    """callbacks.NAME=null removes an entry."""
    entry = "_target_" in content["properties"]
    return content | {"type": ["object", "null"]} if entry else content


def _leaf(leaf: Leaf) -> dict[str, Any]:
    content = _any([*map(alternative, schema.alternatives(leaf.type)), INTERPOLATION])
    if leaf.type and leaf.default == "???":
        content["anyOf"].append({"const": "???"})
    described = {"description": leaf.doc} if leaf.doc else {}
    if leaf.default != "???" and "${" not in str(leaf.default):
        described["default"] = leaf.default
    return described | content if leaf.type else described


def _any(parts: list[Any]) -> dict[str, Any]:
    """One schema of several, with the text of the first that has one."""
    if len(parts) == 1:
        return dict(parts[0])
    texts = [part["description"] for part in parts if "description" in part]
    about = {"description": texts[0]} if texts else {}
    return about | {"anyOf": parts}


def alternative(type_: str) -> dict[str, Any]:
    """One alternative of a comment's type; trainer.config.schema has the grammar."""
    type_ = type_.strip()
    match = re.match(r"[a-z]+", type_)
    name = match.group(0) if match else ""
    bound = type_[len(name) :].strip()
    if type_ == "null":
        return {"type": "null"}
    if type_ == "mapping":
        return {"type": "object"}
    if name == "list" and (not bound or bound.startswith("[")):
        inner = schema.alternatives(bound[1:-1]) if bound else []
        return {"type": "array"} | ({"items": _any([*map(alternative, inner)])} if inner else {})
    if name in _TYPES and (bound == "" or re.match(r"(>|<|in\b)", bound)):
        return {"type": _TYPES[name]} | _limits(bound)
    return {"enum": _spellings(type_)}


def _spellings(choice: str) -> list[Any]:
    """A literal choice as YAML may read it: 8 and true are no texts."""
    value: bool | int | None = {"true": True, "false": False}.get(choice)
    if value is None and re.fullmatch(r"-?\d+", choice):
        value = int(choice)
    return [choice] if value is None else [choice, value]


def _limits(bound: str) -> dict[str, Any]:
    if match := re.fullmatch(r"(>=|<=|>|<)\s*(\S+)", bound):
        return {_BOUNDS[match.group(1)]: _number(match.group(2))}
    if match := re.fullmatch(r"in\s*([\[(])\s*(\S+)\s*,\s*(\S+?)\s*([\])])", bound):
        opening, low, high, closing = match.groups()
        return {
            _BOUNDS[">=" if opening == "[" else ">"]: _number(low),
            _BOUNDS["<=" if closing == "]" else "<"]: _number(high),
        }
    return {}


def _number(text: str) -> float:
    value = float(text)
    return int(value) if value.is_integer() else value
