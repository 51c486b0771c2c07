"""The YAML files of conf/ as a schema: which keys exist, and which values each may take.

A leaf's line ends in a comment that opens with its type, up to the first colon: `rank: 16  # int >= 1: rank of B A`. The
grammar is alternatives divided by `|`, each one of

    int  float  str  bool  null  list  list[int|float|str]  mapping        (a mapping takes any keys)
    int >= 1    float > 0    float in [0, 1)                               (bounds)
    anything else                                                          (a literal choice)

Needs PyYAML and OmegaConf only, so that a wrong key or value is named before torch is imported.
"""

from __future__ import annotations

import difflib
import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

CONF = Path(__file__).resolve().parent.parent / "conf"
INSTANTIATE_KEYS = {"_target_", "_partial_", "_recursive_", "_convert_"}  # hydra.utils.instantiate's own
_SCALARS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}


@dataclass(frozen=True)
class Leaf:
    """One knob: its type as the comment states it, the comment's text, and its file."""

    type: str
    doc: str
    file: str


@dataclass(frozen=True)
class Table:
    """A mapping of knobs: `target` is its `_target_`, `children` its keys."""

    children: dict[str, Any]
    target: str | None
    file: str
    open: bool = False  # further keys are checked elsewhere: the file says `# open: ...`


def options(group: str) -> list[str]:
    """Names that may stand after `group=`: the files of conf/GROUP."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@functools.cache
def load(relative: str) -> Table:
    """The schema of one file of conf/, with the files of its own defaults list merged in."""
    path = CONF / f"{relative}.yaml"
    text = path.read_text("utf-8")
    table = _table(yaml.compose(text), text.splitlines(), f"conf/{relative}.yaml")
    if re.search(r"^# open: ", text, re.MULTILINE):
        table = Table(table.children, table.target, table.file, open=True)
    content: Any = OmegaConf.to_container(OmegaConf.load(path))
    for entry in content.get("defaults") or []:
        if isinstance(entry, str) and entry != "_self_":
            inherited = load(str(Path(relative).parent / entry))
            children = _merged(inherited.children, table.children)
            table = Table(children, table.target or inherited.target, table.file, table.open or inherited.open)
    return table


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        if isinstance(old, Table) and isinstance(value, Table):
            value = Table(_merged(old.children, value.children), value.target or old.target, value.file)
        elif isinstance(old, Leaf) and isinstance(value, Leaf) and not value.type:
            value = Leaf(old.type, old.doc, value.file)  # a variant changes the value only
        result[key] = value
    return result


def _table(node: yaml.MappingNode | None, lines: list[str], file: str) -> Table:
    children: dict[str, Any] = {}
    target = None
    for key_node, value_node in node.value if node is not None else []:
        key = key_node.value
        comment = _comment(lines[key_node.start_mark.line], value_node, key_node.start_mark.line)
        if key == "_target_":
            target = value_node.value
        elif key in INSTANTIATE_KEYS or key in ("defaults", "hydra"):
            continue
        elif isinstance(value_node, yaml.MappingNode) and not comment.startswith("mapping"):
            children[key] = _table(value_node, lines, file)
        else:
            type_, _, doc = comment.partition(":")
            children[key] = Leaf(type_.strip(), doc.strip(), file)
    return Table(children, target, file)


def _comment(line: str, value_node: yaml.Node, row: int) -> str:
    end = value_node.end_mark.column if value_node.end_mark.line == row else len(line)
    found = re.search(r"#\s*(.*)$", line[end:]) or re.search(r"\s#\s+(.*)$", line)
    return found.group(1) if found else ""


def problems(value: Any, schema: Any, where: str) -> list[str]:
    """What is wrong with a plain value at the dotted place `where`: unknown keys, missing ones, wrong types."""
    if isinstance(schema, Leaf):
        if value == "???":
            return [f"{where} is missing. It must be set: {where}=... ({schema.doc})"]
        if accepts(value, schema.type):
            return []
        choices = [a for a in _alternatives(schema.type) if not re.match(r"(int|float|str|bool|list|mapping|null)\b", a)]
        close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.6)
        hint = f" Did you mean {close[0]}?" if close else ""
        return [f"{where} is {value!r}, but must be {schema.type}.{hint} ({schema.doc}; {schema.file})"]
    if value is None and schema.target:
        return []  # callbacks.NAME=null takes an entry out
    if not isinstance(value, dict):
        return [f"{where} is {value!r}, but must be a mapping with the keys {_listed(schema.children)} ({schema.file})"]
    found = []
    for key, item in value.items():
        place = f"{where}.{key}" if where else str(key)
        if key in INSTANTIATE_KEYS:
            if key == "_target_" and item != schema.target:
                found.append(f"{place} is {item!r}. {schema.file} names {schema.target!r}, and only that may be made there")
        elif key in schema.children:
            found += problems(item, schema.children[key], place)
        elif not schema.open:
            found.append(f"{place}: there is no such key. {nearest(str(key), schema.children)} ({schema.file})")
    for key in schema.children:
        if key not in value:
            found.append(f"{where + '.' if where else ''}{key} is missing ({schema.file})")
    return found


def nearest(word: str, known: Any) -> str:
    """A sentence that suggests what `word` was meant to be."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"Did you mean {close[0]}?" if close else f"Known: {_listed(known)}."


def _listed(names: Any) -> str:
    return ", ".join(names) or "none"


def accepts(value: Any, type_: str) -> bool:
    """Whether a value fits a type of the grammar above."""
    return any(_fits(value, alternative.strip()) for alternative in _alternatives(type_))


def _alternatives(type_: str) -> list[str]:
    return re.split(r"\s*\|\s*(?![^\[(]*[\])])", type_)


def _fits(value: Any, type_: str) -> bool:
    word = re.match(r"[a-z]+", type_)
    name = word.group(0) if word else ""
    rest = type_[len(name) :].strip()
    if type_ == "null":
        return value is None
    if type_ == "mapping":
        return isinstance(value, dict)
    if name == "list":
        inner = rest.strip("[]")
        return isinstance(value, list) and (not inner or all(_fits(item, inner) for item in value))
    if name not in _SCALARS or not (rest == "" or re.match(r"(>|<|in\b)", rest)):
        return isinstance(value, str | int | float | bool) and str(value) == type_  # a literal choice
    if not isinstance(value, _SCALARS[name]) or (isinstance(value, bool) and name != "bool"):
        return False
    return _within(value, rest)


def _within(value: Any, bound: str) -> bool:
    if not bound:
        return True
    if match := re.fullmatch(r"(>=|<=|>|<)\s*(\S+)", bound):
        limit = float(match.group(2))
        return {">=": value >= limit, "<=": value <= limit, ">": value > limit, "<": value < limit}[match.group(1)]
    match = re.fullmatch(r"in\s*([\[(])\s*(\S+)\s*,\s*(\S+?)\s*([\])])", bound)
    if match is None:
        raise ValueError(f"the bound {bound!r} cannot be read; see trainer/schema.py")
    opening, low, high, closing = match.groups()
    above = value >= float(low) if opening == "[" else value > float(low)
    below = value <= float(high) if closing == "]" else value < float(high)
    return above and below
