"""The fields of PEFT's configuration classes, read from its source without importing it.

Importing PEFT imports torch, and a misspelt field should be reported in milliseconds.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAME = "default"  # PEFT's name for the only adapter
# arguments of adapters.peft.Peft, not fields of PEFT
OURS = {"_target_", "_partial_", "peft_type", "data_batches", "train_modules", "from"}
NOT_SETTABLE = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
}
UNUSABLE = {
    "POLY": "it needs a task id with every row",
    "MULTITASK_PROMPT_TUNING": "it needs a task id with every row",
    "XLORA": "it mixes adapters that were trained before",
    "CPT": "it needs rows in the layout of its context",
    "SHADOW": "it trains a second model with another loss",
    "CARTRIDGE": "it distils a document's key-value cache, which is another objective",
}
ON_QUANTIZED = {
    "LORA",
    "ADALORA",
    "IA3",
    "HIRA",
    "PVERA",
    "RANDLORA",
    "ROAD",
    "SHIRA",
    "BOFT",
    "OFT",
    "MISS",
    "VERA",
}
PROMPT_LEARNING = {"PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "ADAPTION_PROMPT"}
# LoRA initialisations that subtract the adapter's initial update from the base's weights
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga")


@dataclass
class ConfigClass:
    """One of PEFT's configuration classes: its PeftType and its fields with their annotations."""

    name: str
    peft_type: str | None
    fields: dict[str, ast.expr]
    bases: list[str] = field(default_factory=list)


@functools.cache
def classes() -> dict[str, ConfigClass]:
    """Return PEFT's dataclasses by name, with inherited fields."""
    spec = importlib.util.find_spec("peft")  # finds the top-level package without importing it
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = Path(spec.submodule_search_locations[0])
    by_name: dict[str, ConfigClass] = {}
    for path in [
        root / "config.py",
        *sorted(root.glob("tuners/*/config.py")),
        root / "tuners/lycoris_utils.py",
    ]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                fields = {
                    n.target.id: n.annotation
                    for n in node.body
                    if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
                }
                types = [
                    n.value.attr
                    for n in ast.walk(node)
                    if isinstance(n, ast.Assign)
                    and ast.unparse(n.targets[0]) == "self.peft_type"
                    and isinstance(n.value, ast.Attribute)
                ]
                bases = [ast.unparse(base) for base in node.bases]
                by_name[node.name] = ConfigClass(
                    node.name, types[-1] if types else None, fields, bases
                )
    for entry in by_name.values():
        entry.fields = dict(_inherited(entry, by_name))
    return by_name


def _inherited(
    entry: ConfigClass, by_name: dict[str, ConfigClass]
) -> Iterator[tuple[str, ast.expr]]:
    for base in entry.bases:
        if base in by_name:
            yield from _inherited(by_name[base], by_name)
    yield from entry.fields.items()


def config_class(peft_type: str) -> ConfigClass | None:
    """Return the class of a PeftType (LORA) or of a class name (LoraConfig)."""
    by_name = classes()
    if peft_type in by_name and by_name[peft_type].peft_type:
        return by_name[peft_type]
    return next((c for c in by_name.values() if c.peft_type == peft_type.upper()), None)


def usable() -> list[str]:
    """Return the PeftTypes that can be trained here."""
    return sorted(
        c.peft_type for c in classes().values() if c.peft_type and c.peft_type not in UNUSABLE
    )


def problems(
    adapter: dict[str, Any],
    quantized: bool,
    packing: bool,
    classification: bool,
    checkpointing: bool,
) -> Iterator[str]:
    """Yield the faults of the `adapter` node of a config with adapters.peft.Peft."""
    entry = config_class(str(adapter["peft_type"]))
    if entry is None or entry.peft_type is None:
        yield f"adapter.peft_type is {adapter['peft_type']!r}. Known: {', '.join(usable())}"
        return
    kind = entry.peft_type
    if kind in UNUSABLE:
        yield (
            f"adapter.peft_type={kind} cannot be trained here: {UNUSABLE[kind]}. Known:"
            f" {', '.join(usable())}"
        )
    for key, value in adapter.items():
        if key not in OURS:
            yield from _field_problems(f"adapter.{key}", key, value, entry)
    if quantized and kind not in ON_QUANTIZED | PROMPT_LEARNING:
        able = ", ".join(sorted(ON_QUANTIZED | PROMPT_LEARNING))
        yield (
            f"adapter.peft_type={kind} cannot sit on a quantised base. These can: {able}; or set"
            " base.quantization=none"
        )
    init = str(adapter.get("init_lora_weights"))
    if quantized and init.startswith(CHANGES_BASE):
        yield (
            f"adapter.init_lora_weights={init} changes the base's weights, which cannot be done to"
            " a quantised base: set base.quantization=none"
        )
    if init.startswith(CHANGES_BASE) and adapter.get("use_dora"):
        yield (
            f"adapter.init_lora_weights={init} with use_dora=true cannot be turned into an adapter"
            " for the original base: choose one"
        )
    if init == "loftq" and not quantized:
        yield (
            "adapter.init_lora_weights=loftq fits an adapter to a quantised base's rounding error:"
            " set base.quantization=nf4"
        )
    if kind in PROMPT_LEARNING and packing:
        yield (
            f"adapter.peft_type={kind} puts virtual tokens before a row, packing=true puts several"
            " rows in one sequence: set packing=false"
        )
    if kind == "PREFIX_TUNING" and checkpointing:
        hint = "set objective.gradient_checkpointing=false"
        yield (
            f"adapter.peft_type={kind} keeps its prefix in the key-value cache, which gradient"
            f" checkpointing drops: {hint}"
        )
    if kind == "ADAPTION_PROMPT" and classification:
        yield (
            "adapter.peft_type=ADAPTION_PROMPT is made for causal language models, not for"
            " classification"
        )


def _field_problems(setting: str, key: str, value: Any, entry: ConfigClass) -> Iterator[str]:
    if key not in entry.fields:
        close = difflib.get_close_matches(key, entry.fields, n=1)
        hint = (
            f"Did you mean {close[0]}?"
            if close
            else f"It has: {', '.join(sorted(entry.fields.keys() - NOT_SETTABLE))}."
        )
        yield f"{setting}: PEFT's {entry.name} has no such field. {hint}"
    elif key in NOT_SETTABLE:
        yield f"{setting} is set by the run itself"
    elif key == "init_lora_weights" and re.fullmatch(r"pissa_niter_\d+|lora_ga", str(value)):
        return  # PEFT takes these and annotates them as something else, or not at all
    elif value != "???" and not _fits(value, entry.fields[key]):
        annotation = ast.unparse(entry.fields[key])
        yield f"{setting} is {value!r}, but PEFT's {entry.name} takes {annotation}"
    elif isinstance(value, dict):
        for name in (n.id for n in ast.walk(entry.fields[key]) if isinstance(n, ast.Name)):
            if name in classes():
                for inner, item in value.items():
                    yield from _field_problems(f"{setting}.{inner}", inner, item, classes()[name])


def _fits(value: Any, annotation: ast.expr) -> bool:
    """Return whether a plain value fits an annotation. Names of other types accept mappings,
    strings and null."""
    if isinstance(annotation, ast.Constant):
        return annotation.value is value or (
            isinstance(annotation.value, str)
            and _fits(value, ast.parse(annotation.value, mode="eval").body)
        )
    if isinstance(annotation, ast.BinOp):  # X | Y
        return _fits(value, annotation.left) or _fits(value, annotation.right)
    if isinstance(annotation, ast.Subscript):
        outer = ast.unparse(annotation.value).rpartition(".")[2]
        inner = (
            annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        )
        if outer == "Optional":
            return value is None or _fits(value, inner[0])
        if outer == "Union":
            return any(_fits(value, part) for part in inner)
        if outer == "Literal":
            return any(isinstance(part, ast.Constant) and part.value == value for part in inner)
        if outer.lower() in ("list", "set", "tuple", "sequence", "iterable"):
            return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
        return isinstance(value, dict)
    name = ast.unparse(annotation).rpartition(".")[2]
    if name == "bool":
        return isinstance(value, bool)
    if name == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if name == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if name == "str":
        return isinstance(value, str)
    if name in ("list", "set", "tuple", "List"):
        return isinstance(value, list)
    if name in ("dict", "Dict"):
        return isinstance(value, dict)
    return value is None or isinstance(value, dict | str) or name == "Any"
