"""graft schema: what an editor accepts is what trainer.config.schema accepts."""

from __future__ import annotations

import json
import re

import pytest
from omegaconf import OmegaConf

from tests.toys.commands import exit_code
from trainer import schema as command
from trainer.config import json_schema, schema

TYPES = {
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
}
LIMITS = {
    "minimum": lambda v, limit: v >= limit, "exclusiveMinimum": lambda v, limit: v > limit,
    "maximum": lambda v, limit: v <= limit, "exclusiveMaximum": lambda v, limit: v < limit,
}  # fmt: skip
KNOWN = {
    "$schema", "title", "description", "default", "type", "enum", "const", "anyOf", "properties",
    "required", "additionalProperties", "items", "pattern", *LIMITS,
}  # fmt: skip
PROBES = [
    None, True, False, 0, 1, 2, 16, -1, 0.0, 0.5, 1.0, 1.5, -0.1, "", "x", "auto", "loss", "min",
    "lora", "last", [], [1], ["a"], [0.5], [None], {}, {"a": 1}, "true", "8",
]  # fmt: skip


def valid(value, content):
    """Whether a value fits, by the words of draft 2020-12 that json_schema writes."""
    assert set(content) <= KNOWN, set(content) - KNOWN
    kinds = content.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(TYPES[kind](value) for kind in kinds):
        return False
    same = [each == value and type(each) is type(value) for each in content.get("enum", [])]
    if "enum" in content and not any(same):
        return False
    if "const" in content and content["const"] != value:
        return False
    if "anyOf" in content and not any(valid(value, part) for part in content["anyOf"]):
        return False
    if isinstance(value, str) and "pattern" in content:
        return re.search(content["pattern"], value) is not None
    if TYPES["number"](value):
        return all(LIMITS[name](value, content[name]) for name in LIMITS if name in content)
    if isinstance(value, list) and "items" in content:
        return all(valid(item, content["items"]) for item in value)
    if isinstance(value, dict) and not set(content.get("required", [])) <= set(value):
        return False
    if isinstance(value, dict) and "properties" in content:
        further = content.get("additionalProperties", True)
        return all(
            valid(item, content["properties"][key]) if key in content["properties"] else further
            for key, item in value.items()
        )
    return True


def leaves(table):
    for child in table.children.values():
        if isinstance(child, schema.Table):
            yield from leaves(child)
        elif child.type:
            yield child


@pytest.mark.long
def test_each_setting_takes_the_same_values_in_an_editor():
    files = ["config", *(name for name in json_schema.names() if "/" in name)]
    compared = 0
    for leaf in {leaf for name in files for leaf in leaves(schema.load(name))}:
        content = json_schema._leaf(leaf)
        for value in PROBES:
            ours = schema.accepts(value, leaf.type)
            assert valid(value, content) == ours, (leaf, value)
            compared += 1
        assert valid("${seed}", content)
    assert compared > 3000


@pytest.mark.long
@pytest.mark.parametrize("name", schema.options("experiment"))
def test_our_own_experiments_fit(name):
    content = json_schema.of("experiment")
    # as OmegaConf reads numbers, which an editor reads the same
    file = schema.CONF / "experiment" / f"{name}.yaml"
    value = OmegaConf.to_container(OmegaConf.load(file))
    assert valid(value, content)
    assert json.loads(json.dumps(content)) == content
    for wrong in ({"optimizer": {"lrr": 1}}, {"batch_size": 0}, {"adapter": {"rank": "x"}},
                  {"defaults": [{"override /adapter": "loraa"}]}, {"nmae": "x"}):  # fmt: skip
        assert not valid(value | wrong, content)


@pytest.mark.parametrize("name", json_schema.names())
def test_each_file_fits_its_own_schema(name):
    content = json_schema.of(name)
    if "/" in name:
        group, choice = name.split("/")
        path = schema.CONF / group / f"{choice}.yaml"
        value = OmegaConf.to_container(OmegaConf.load(path))
        value.pop("defaults", None)
        assert valid(value, content)
        assert valid(value, json_schema.of(group) | {"additionalProperties": True})


@pytest.mark.long
def test_the_command(tmp_path, capsys):
    assert exit_code(command.main, ["of=adapter/lora"]) == 0
    content = json.loads(capsys.readouterr().out)
    leaf = schema.load("adapter/lora").children["rank"]
    assert content["properties"]["rank"]["description"] == leaf.doc
    assert content["properties"]["rank"]["default"] == leaf.default
    assert exit_code(command.main, [f"out={tmp_path / 's.json'}"]) == 0
    assert json.loads((tmp_path / "s.json").read_text())["$schema"] == json_schema.DRAFT
    assert exit_code(command.main, ["of=adaptr"]) == 2
    assert "Did you mean adapter?" in capsys.readouterr().err
