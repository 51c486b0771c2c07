"""The class of transformers that loads a model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText


def text_model_class(config: Any) -> Any:
    """Return the class of transformers that loads a model which writes text: AutoModelForCausalLM,
    or for a vision-language model that it does not know, the class of those, used without
    images."""
    kind = type(config)
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if remote or kind in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    return (
        AutoModelForImageTextToText
        if kind in AutoModelForImageTextToText._model_mapping
        else AutoModelForCausalLM
    )


def adapter_fault(path: str) -> str | None:
    """Return why a folder that holds an adapter is no base: transformers would load its base with
    the adapter, and train a second one on both. None for other folders."""
    file = Path(path) / "adapter_config.json"
    if not file.is_file():
        return None
    try:
        named = json.loads(file.read_text("utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        named = None
    return (
        f"base.path={path!r} is an adapter of PEFT, not a model: set"
        f" base.path={named or 'its base'}, or merge the adapter into its base and give that folder"
    )
