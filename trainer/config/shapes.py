"""The shape of plain data that may come from a stranger, or may be damaged."""

from __future__ import annotations

from types import NoneType
from typing import Any

LARGEST = 1 << 63  # of a whole number: larger ones do not fit into a float or an array
NUMBER = (int, float)
MAYBE_NUMBER = (int, float, NoneType)


def mismatch(value: Any, shape: Any, place: str = "") -> str | None:
    """Return how a value differs from a shape, None if it fits.

    A shape is a type or a tuple of types; {key: shape}, where `key?` may be missing and `*` is
    every other key; [shape] for a list of any length. A bool is no number.
    """
    where = place or "it"
    if shape is object:
        return None
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{where} is {_kind(value)}, expected a mapping"
        if others := shape.get("*"):
            named = {key.rstrip("?") for key in shape}
            shape = shape | {key: others for key in value if key not in named}
        parts = ((key.rstrip("?"), part, key) for key, part in shape.items() if key != "*")
        for key, part, spelled in parts:
            at = f"{place}.{key}" if place else str(key)
            if key not in value:
                if spelled == key:
                    return f"{at} is missing"
            elif (fault := mismatch(value[key], part, at)) is not None:
                return fault
        return None
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{where} is {_kind(value)}, expected a list"
        faults = (mismatch(item, shape[0], f"{where}[{at}]") for at, item in enumerate(value))
        return next((fault for fault in faults if fault is not None), None)
    kinds = shape if isinstance(shape, tuple) else (shape,)
    number = isinstance(value, int) and not isinstance(value, bool)
    if (not isinstance(value, kinds)) or (isinstance(value, bool) and bool not in kinds):
        return f"{where} is {_kind(value)}, expected {' or '.join(_NAMES[kind] for kind in kinds)}"
    if number and abs(value) >= LARGEST:
        return f"{where} is a number of {len(hex(value)) * 4} bits, expected at most 64"
    return None


_NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a mapping",
    list: "a list",
    NoneType: "null",
}


def _kind(value: Any) -> str:
    return _NAMES.get(type(value), type(value).__name__)
