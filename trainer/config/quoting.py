"""Quotes around values that Hydra's grammar of overrides cannot read otherwise."""

from __future__ import annotations

import re
import shlex
from typing import Any

from trainer.config import schema

# Values that Hydra's grammar reads without quotes. Others are tried with Hydra's parser.
_PLAIN = re.compile(r"[A-Za-z0-9_./+-]*")


def key_of(word: str) -> str:
    """Return an override's key without prefix and package: `task.path` of `++task.path=x`."""
    return word.lstrip("+~").partition("=")[0].partition("@")[0]


def quoted(word: str, sweep: bool = False) -> str:
    """Return an override with its value quoted if Hydra's grammar would not read it as meant.

    Lists, dicts, interpolations, functions and, in a sweep, values separated by commas are not
    changed. Neither is a value that opens a list, a dict, a quotation or an interpolation and does
    not close it: Hydra refuses it, and `how_to_quote` explains the fix.
    """
    key, _, value = word.partition("=")
    if _PLAIN.fullmatch(value):
        return word
    if (parsed := _parsed(word)) is not None:
        if parsed.is_sweep_override() and not sweep and "," in value and _takes_text(key):
            return f"{key}={in_quotes(value)}"
        return word
    if value[0] in "'\"" or value.count("${") > value.count("}"):
        return word
    if value[0] in "[{" and any(value.count(a) != value.count(b) for a, b in ("[]", "{}")):
        return word
    if re.fullmatch(r"\[[^][{}'\"]*\]", value):
        return f"{key}=[{_each_quoted(value[1:-1])}]"
    return f"{key}={_each_quoted(value) if sweep else in_quotes(value)}"


def _each_quoted(values: str) -> str:
    """Quote each of several values that Hydra's grammar cannot read."""
    return ",".join(
        value if _parsed(f"key={value}") is not None else in_quotes(value)
        for value in values.split(",")
    )


def _parsed(word: str) -> Any:
    """Parse an override as Hydra does; None if Hydra cannot read it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def in_quotes(value: str) -> str:
    """Put a text into the quotes of Hydra's grammar."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text=value, quote=Quote.single).with_quotes()


def how_to_quote(word: str) -> str:
    """Explain how to write a value so that Hydra reads it as text."""
    key, _, value = word.lstrip("+").partition("=")
    literal = in_quotes(value).replace("${", "\\${")
    return f"If this is text, write {shlex.quote(f'{key}={literal}')}"


def _takes_text(key: str) -> bool:
    """Return whether a setting of conf/ takes any text, so that a comma is part of it."""
    group, *path = key_of(key).split(".")
    tables = [schema.load(f"{group}/{name}") for name in schema.options(group)]
    if not tables:
        tables, path = [schema.load("config")], [group, *path]
    for node in tables:
        for name in path:
            inside = isinstance(node, schema.Table)
            node = node.children.get(name) if inside else None  # type: ignore[assignment]
        if isinstance(node, schema.Leaf) and schema.accepts("a,b", node.type):
            return True
    return False
