"""The YAML files of conf/ as a schema: which keys exist, and which values each may take.

A leaf's line ends in a comment. It opens with the type, up to the first colon:
`rank: 16  # int >= 1: rank of B A`. The type is one or more alternatives divided by `|`:

    int  float  str  bool  null  list  list[int|float|str]  mapping       (a mapping takes any keys)
    int >= 1    float > 0    float in [0, 1)                               (bounds)
    anything else                                                          (a literal choice)

It needs PyYAML only: a wrong key or value is reported before torch is imported.
"""

from __future__ import annotations

import copy
import difflib
import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from trainer.config.foreign import counterpart
from trainer.config.limits import LOADER

CONF = Path(__file__).resolve().parent.parent.parent / "conf"
# the keys that hydra.utils.instantiate reads
INSTANTIATE_KEYS = {"_target_", "_partial_", "_recursive_", "_convert_"}
_SCALARS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
}


class _Loader(LOADER):  # type: ignore[misc]
    """Reads numbers as OmegaConf does: 1e-4 is a float."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?\d+(_\d+)*[eE][-+]?\d+$"),
    list("-+0123456789"),
)


@dataclass(frozen=True)
class Leaf:
    """One setting: its comment's type and text, its file, and its value there, `???` for none."""

    type: str
    doc: str
    file: str
    default: Any = field(default="???", compare=False)


@dataclass(frozen=True)
class Table:
    """A mapping of settings: `target` is its `_target_`, `children` its keys."""

    children: dict[str, Any]
    target: str | None
    file: str
    open: bool = False  # further keys are checked elsewhere: the file says `# open: ...`
    partial: bool = False  # its `_partial_`


def options(group: str) -> list[str]:
    """Return the names that can follow `group=`: the files of conf/GROUP."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@functools.cache
def load(relative: str) -> Table:
    """Return the schema of one file of conf/, merged with the files of its defaults list."""
    path = CONF / f"{relative}.yaml"
    text = path.read_text("utf-8")
    content: Any = yaml.load(text, Loader=_Loader) or {}
    table = _table(
        yaml.compose(text, Loader=_Loader), text.splitlines(), f"conf/{relative}.yaml", content
    )
    if re.search(r"^# open: ", text, re.MULTILINE):
        table = replace(table, open=True)
    for entry in content.get("defaults") or []:
        if isinstance(entry, str) and entry != "_self_":
            inherited = load(str(Path(relative).parent / entry))
            table = Table(
                _merged(inherited.children, table.children),
                table.target or inherited.target,
                table.file,
                table.open or inherited.open,
                table.partial or inherited.partial,
            )
    return table


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        base = result.get(key)
        if isinstance(base, Table) and isinstance(value, Table):
            value = replace(
                value,
                children=_merged(base.children, value.children),
                target=value.target or base.target,
            )
        elif isinstance(base, Leaf) and isinstance(value, Leaf) and not value.type:
            value = replace(value, type=base.type, doc=base.doc)  # a variant only changes the value
        result[key] = value
    return result


def _table(
    node: yaml.MappingNode | None, lines: list[str], file: str, values: dict[str, Any]
) -> Table:
    children: dict[str, Any] = {}
    target, partial = None, False
    for key_node, value_node in node.value if node is not None else []:
        key = key_node.value
        comment = _comment(lines[key_node.start_mark.line], value_node, key_node.start_mark.line)
        if key == "_target_":
            target = value_node.value
        elif key == "_partial_":
            partial = value_node.value == "true"
        elif key in INSTANTIATE_KEYS or key in ("defaults", "hydra"):
            continue
        elif isinstance(value_node, yaml.MappingNode) and not comment.startswith("mapping"):
            children[key] = _table(value_node, lines, file, values[key])
        else:
            type_, _, doc = comment.partition(": ")  # a choice may be 2:4
            children[key] = Leaf(type_.strip(), doc.strip(), file, values[key])
    return Table(children, target, file, partial=partial)


def _comment(line: str, value_node: yaml.Node, row: int) -> str:
    end = value_node.end_mark.column if value_node.end_mark.line == row else len(line)
    match = re.search(r"#\s*(.*)$", line[end:]) or re.search(r"\s#\s+(.*)$", line)
    return match.group(1) if match else ""


def problems(value: Any, schema: Any, where: str, incomplete: bool = False) -> list[str]:
    """List what is wrong with a plain value at the dotted key `where`.

    Reports unknown keys, missing keys and wrong types. With `incomplete` a value that the user
    still has to set may be missing.
    """
    if isinstance(schema, Leaf):
        return _leaf_problems(value, schema, where, incomplete)
    if value is None and schema.target and "." in where:
        return []  # callbacks.NAME=null removes an entry
    if value is None and "none" in (options(where) if (CONF / where).is_dir() else ()):
        return [
            f"{where} is null. To have none: {where}=none, or in a file `override /{where}: none`"
            " under `defaults`"
        ]
    if not isinstance(value, dict):
        return [
            f"{where} is {value!r}, but must be a mapping with the keys {_listed(schema.children)}"
            f" ({schema.file})"
        ]
    prefix = f"{where}." if where else ""
    faults = _changed_target(value, schema, prefix)
    for key, item in value.items():
        if key in INSTANTIATE_KEYS:
            continue
        if key in schema.children:
            faults += problems(item, schema.children[key], f"{prefix}{key}", incomplete)
        elif not schema.open:
            faults.append(
                f"{prefix}{key}: there is no such key."
                f" {hint(str(key), schema.children, where)} ({schema.file})"
            )
        elif holds_object(item):
            faults.append(
                f"{prefix}{key} is {item!r}, and no object may be created there ({schema.file})"
            )
    return faults + [
        f"{prefix}{key} is missing ({schema.file})" for key in _missing(value, schema, where)
    ]


def _leaf_problems(value: Any, leaf: Leaf, where: str, incomplete: bool) -> list[str]:
    if value == "???":
        message = f"{where} is missing. It must be set: {where}=... ({leaf.doc})"
        return [] if incomplete else [message]
    if holds_object(value):
        return [f"{where} is {value!r}, and no object may be created there ({leaf.file})"]
    if accepts(value, leaf.type):
        return []
    types = re.compile(r"(int|float|str|bool|list|mapping|null)\b")
    choices = [choice for choice in alternatives(leaf.type) if not types.match(choice)]
    close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.6)
    hint = f" Did you mean {close[0]}?" if close else ""
    if counts_steps(leaf.type) and isinstance(value, float) and value >= 1:
        hint = f" A whole number is a count, one below 1 a fraction: write {round(value)}."
    return [f"{where} is {value!r}, but must be {leaf.type}.{hint} ({leaf.doc}; {leaf.file})"]


def counts_steps(type_: str) -> bool:
    """Return whether a type takes whole numbers, and below 1 fractions: a length, in most cases in
    steps of the run."""
    return accepts(2, type_) and accepts(0.5, type_) and not accepts(2.0, type_)


def whole_steps(value: Any, schema: Table) -> None:
    """Replace, in place, lengths such as 20.0 in a plain mapping by the whole steps that older
    versions read them as."""
    for key, child in schema.children.items():
        item = value.get(key)
        if isinstance(child, Table) and isinstance(item, dict):
            whole_steps(item, child)
        elif isinstance(child, Leaf) and isinstance(item, float) and item >= 1:
            value[key] = int(item) if counts_steps(child.type) else item
        elif isinstance(child, Leaf) and isinstance(item, list) and "float in (0, 1)" in child.type:
            value[key] = [int(one) if isinstance(one, float) and one >= 1 else one for one in item]


def _changed_target(value: dict[str, Any], schema: Table, prefix: str) -> list[str]:
    """List keys of hydra.utils.instantiate whose values differ from those of the file."""
    fixed = {
        "_target_": schema.target,
        "_partial_": schema.partial or None,
        "_recursive_": None,
        "_convert_": None,
    }
    return [
        f"{prefix}{key} is {value.get(key)!r}. {schema.file} has {item!r}, and only that is allowed"
        for key, item in fixed.items()
        if value.get(key) != item
    ]


def _missing(value: dict[str, Any], schema: Table, where: str) -> list[str]:
    """List required keys that a mapping lacks. An entry such as callbacks.NAME may be removed."""
    entries = [
        key
        for key, child in schema.children.items()
        if where and isinstance(child, Table) and child.target
    ]
    return [key for key in schema.children if key not in value and key not in entries]


def complete(value: dict[str, Any], schema: Table, where: str = "") -> list[str]:
    """Add missing keys to a plain mapping, in place, with the values of the schema's files. Return
    their dotted names.
    """
    prefix = f"{where}." if where else ""
    missing, added = _missing(value, schema, where), []
    for key, child in schema.children.items():
        if isinstance(child, Leaf):
            if key in missing and child.default != "???":
                value[key] = copy.deepcopy(child.default)
                added.append(f"{prefix}{key}")
        elif key in missing:
            value[key] = ({"_target_": child.target} if child.target else {}) | (
                {"_partial_": True} if child.partial else {}
            )
            complete(value[key], child, f"{prefix}{key}")
            added.append(f"{prefix}{key}")
        elif isinstance(value.get(key), dict):
            added += complete(value[key], child, f"{prefix}{key}")
    return added


def leaves(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield (path, value) for all values of a plain config."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, (*path, str(key)))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from leaves(value, (*path, str(index)))
    else:
        yield path, node


def holds_object(value: Any) -> bool:
    """Return whether hydra.utils.instantiate would create an object from any part of a value."""
    if isinstance(value, dict):
        return bool(INSTANTIATE_KEYS & value.keys()) or any(map(holds_object, value.values()))
    return isinstance(value, list) and any(map(holds_object, value))


def hint(key: str, known: Any, group: str = "") -> str:
    """Return a sentence on an unknown key of a group, or of the whole config: what it is called
    here, who has it, or the closest known one."""
    here = counterpart(key)
    if not group:
        parts = [name for name in known if key in load_group(name)]
        dotted = " or ".join(f"{part}.{key}" for part in parts[:3])
        return here or (f"Did you mean {dotted}?" if parts else nearest(key, known))
    if here is not None and any(f" {group}.{name}." in here for name in known):
        return here
    names = options(group) if "." not in group else []
    others = [name for name in names if key in load(f"{group}/{name}").children]
    if others:
        more = f" and {len(others) - 4} more" if len(others) > 5 else ""
        return f"It is a key of {group}={', '.join(others[: 4 if more else 5])}{more}."
    if names and key in load("config").children:
        return f"Did you mean {key}, which is in no group?"
    return nearest(key, known)


def load_group(name: str) -> set[str]:
    """Return the keys of all files of a group; none for what is no group."""
    return {key for choice in options(name) for key in load(f"{name}/{choice}").children}


def nearest(word: str, known: Any) -> str:
    """Return a sentence with the known name that is closest to `word`, or all of them."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"Did you mean {close[0]}?" if close else f"Known: {_listed(known)}."


def _listed(names: Any) -> str:
    return ", ".join(names) or "none"


def accepts(value: Any, type_: str) -> bool:
    """Return whether a value fits a type of the grammar above."""
    return any(_fits(value, alternative.strip()) for alternative in alternatives(type_))


def alternatives(type_: str) -> list[str]:
    """Return the alternatives of a type of the grammar above."""
    return re.split(r"\s*\|\s*(?![^\[(]*[\])])", type_)


def _fits(value: Any, type_: str) -> bool:
    word = re.match(r"[a-z]+", type_)
    name = word.group(0) if word else ""
    bound = type_[len(name) :].strip()
    if type_ == "null":
        return value is None
    if type_ == "mapping":
        return isinstance(value, dict)
    if name == "list":
        inner = bound[1:-1]
        return isinstance(value, list) and (
            not inner or all(accepts(item, inner) for item in value)
        )
    if name not in _SCALARS or not (bound == "" or re.match(r"(>|<|in\b)", bound)):
        # a literal choice
        return isinstance(value, str | int | float | bool) and str(value) == type_
    if not isinstance(value, _SCALARS[name]) or (isinstance(value, bool) and name != "bool"):
        return False
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return _within(value, bound)


def _within(value: Any, bound: str) -> bool:
    if not bound:
        return True
    if match := re.fullmatch(r"(>=|<=|>|<)\s*(\S+)", bound):
        limit = float(match.group(2))
        return {">=": value >= limit, "<=": value <= limit, ">": value > limit, "<": value < limit}[
            match.group(1)
        ]
    match = re.fullmatch(r"in\s*([\[(])\s*(\S+)\s*,\s*(\S+?)\s*([\])])", bound)
    if match is None:
        raise ValueError(f"the bound {bound!r} cannot be read; see trainer/config/schema.py")
    opening, low, high, closing = match.groups()
    above = value >= float(low) if opening == "[" else value > float(low)
    below = value <= float(high) if closing == "]" else value < float(high)
    return above and below
