"""PEFT's configuration dataclasses from plain values, and back."""

from __future__ import annotations

import ast
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass
from typing import Any

import peft

from adapters.peft_fields import classes

# Fields that decide neither which tensors a method has nor what they mean.
_FREE = {
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "trainable_token_indices",
    "ensure_weight_tying",
    "base_model_name_or_path",
    "inference_mode",
    "task_type",
    "auto_mapping",
    "peft_version",
    "revision",
    "fan_in_fan_out",
    "layers_to_transform",
    "layers_pattern",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
}


def decides(field: str) -> bool:
    """Return whether a field decides which tensors a method has, or what they mean."""
    return field not in _FREE and not field.startswith("init_") and "dropout" not in field


def build(class_name: str, values: dict[str, Any]) -> Any:
    """Build one of PEFT's dataclasses from plain values, with nested dataclasses from mappings."""
    cls = getattr(peft if hasattr(peft, class_name) else peft.tuners.lora.config, class_name)
    annotations = classes()[class_name].fields
    nested = {}
    for key, value in values.items():
        names = (
            [node.id for node in ast.walk(annotations[key]) if isinstance(node, ast.Name)]
            if key in annotations
            else []
        )
        inner = next((name for name in names if name in classes()), None)
        # PEFT's default for some of them is {}, which stays as it is: for an instance of their
        # class PEFT warns.
        nested[key] = build(inner, value) if inner and isinstance(value, dict) and value else value
    known = {f.name for f in dataclass_fields(cls) if f.init}
    return cls(**{key: value for key, value in nested.items() if key in known})


def plain(value: Any) -> Any:
    """Return plain data: dataclasses as mappings, sets as sorted lists, enums as values."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclass_fields(value)}
    if isinstance(value, set | list | tuple):
        return sorted(map(plain, value)) if isinstance(value, set) else [plain(v) for v in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return getattr(value, "value", value)
