"""Rows of Arrow and parquet as their files meant them, by the features of `datasets`."""

from __future__ import annotations

import json
from typing import Any


def described(schema: Any) -> dict[str, Any]:
    """Return the features of `datasets` that the schema of a parquet file names."""
    try:
        stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return stored.get("info", {}).get("features") or {}
    except (ValueError, AttributeError):
        return {}


def decoded(feature: Any) -> Any:
    """Return a description with Json features that are not parsed again."""
    if isinstance(feature, dict):
        kind = {"_type": "Decoded"} if feature.get("_type") == "Json" else {}
        return {key: decoded(item) for key, item in feature.items()} | kind
    return feature


def present(value: Any, feature: Any = None, top: bool = True) -> Any:
    """Return a row of Arrow without the keys of its structs that are null: a struct has every key
    that any row has, so null stands for a key that this row did not have.

    `feature` is its description by `datasets`. A Json feature keeps its nulls, which its row had,
    and is parsed if it is text still."""
    kind = feature.get("_type") if isinstance(feature, dict) else None
    if kind in ("Json", "Decoded"):
        return json.loads(value) if kind == "Json" and isinstance(value, str) else value
    if isinstance(value, dict):
        known = feature if isinstance(feature, dict) else {}
        return {
            key: present(item, known.get(key), False)
            for key, item in value.items()
            if top or item is not None
        }
    if isinstance(value, list):
        inner = feature.get("feature") if isinstance(feature, dict) else None
        return [present(item, inner, False) for item in value]
    return value
