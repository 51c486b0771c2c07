"""The words that can follow an unfinished command line: commands, options, groups and keys."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator
from typing import Any

from trainer.config import json_schema, schema
from trainer.config.commands import NAMES
from trainer.config.groups import default_choices
from trainer.config.options import choices_of, members
from trainer.config.overrides import groups


def candidates(line: str, options_of: Callable[[str], Any]) -> list[str]:
    """Return the words that the last, unfinished word of a line can become. `graft` is its first
    word. A word that ends in = or . can continue. `options_of` gives the options of a command."""
    words = line.split(" ")
    earlier, last = [word for word in words[1:-1] if word], words[-1]
    first = earlier[0] if earlier else ""
    if not earlier:
        return _starting(last, [*commands(), *_settings(last, earlier)])
    if first == "help":
        return _starting(last, commands())
    if first in NAMES:
        return _starting(last, _options(options_of(first), last, earlier))
    return _starting(last, _settings(last, earlier))


def commands() -> list[str]:
    """Return the commands, and help."""
    return sorted([*NAMES, "help"])


def _starting(word: str, names: Any) -> list[str]:
    return [name for name in dict.fromkeys(names) if name.startswith(word) and name != word]


def _options(kind: Any, word: str, earlier: list[str]) -> Iterator[str]:
    """Yield `KEY=` and `KEY=VALUE` of a command's options, and of the settings that it takes."""
    if kind is None:
        return
    hints = typing.get_type_hints(kind)
    earlier_keys = {each.partition("=")[0] for each in earlier}
    for field in dataclasses.fields(kind):
        if "takes" in field.metadata:
            if not field.metadata.get("places"):
                allowed = field.metadata["takes"]
                yield from (w for w in _settings(word, earlier) if allowed(w.partition("=")[0]))
            continue
        key = field.metadata.get("key") or field.name
        if key in earlier_keys:
            continue
        yield f"{key}="
        if word.startswith(f"{key}="):
            yield from (f"{key}={value}" for value in _values(hints[field.name]))


def _values(hint: Any) -> list[str]:
    return [*choices_of(hint), *(["true", "false"] if bool in members(hint) else [])]


def _settings(word: str, earlier: list[str]) -> Iterator[str]:
    """Yield groups with their choices, and keys of conf/ with theirs, as far as `word` goes."""
    plus = word[: len(word) - len(word.lstrip("+~"))]
    name, equals, _ = word.lstrip("+~").partition("=")
    known = groups()
    if equals and name in known:
        yield from (f"{plus}{name}={choice}" for choice in schema.options(name))
        return
    chosen: dict[str, Any] = default_choices() | {
        key.lstrip("+"): value
        for key, _, value in (each.partition("=") for each in earlier)
        if key.lstrip("+") in known
    }
    table, prefix = schema.load("config"), plus
    *parents, leaf = name.split(".")
    if parents and parents[0] in known:
        choice = chosen.get(parents[0])
        choices = [choice] if choice in schema.options(parents[0]) else schema.options(parents[0])
        tables = [schema.load(f"{parents[0]}/{each}") for each in choices]
        children = {key: child for each in tables for key, child in each.children.items()}
        table, prefix = schema.Table(children, None, ""), f"{plus}{parents[0]}."
        parents = parents[1:]
    for parent in parents:
        child = table.children.get(parent)
        if not isinstance(child, schema.Table):
            return
        table, prefix = child, f"{prefix}{parent}."
    if equals:
        yield from (f"{prefix}{leaf}={value}" for value in _choices_of(table.children.get(leaf)))
        return
    for key, child in table.children.items():
        yield f"{prefix}{key}" + ("." if isinstance(child, schema.Table) else "=")
    if prefix == plus:
        for group in known:
            yield f"{plus}{group}="
            if group != "experiment":
                yield f"{plus}{group}."


def _choices_of(leaf: Any) -> list[str]:
    """The literal values of a setting, from its comment."""
    if leaf is None or not hasattr(leaf, "type"):
        return []
    values = []
    for part in map(json_schema.alternative, schema.alternatives(leaf.type)):
        values += [str(each) for each in part.get("enum", [])[:1]]
        values += ["true", "false"] if part.get("type") == "boolean" else []
        values += ["null"] if part.get("type") == "null" else []
    return values
