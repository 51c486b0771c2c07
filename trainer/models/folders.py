"""The class of transformers that loads a model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM


def text_model_class(config: Any) -> Any:
    """Return the class of transformers that loads a model which writes text: that of its
    encoder-decoders, else AutoModelForCausalLM, or for a vision-language model that it does not
    know, the class of those, used without images."""
    kind = type(config)
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if remote or kind in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    return (
        AutoModelForImageTextToText
        if kind in AutoModelForImageTextToText._model_mapping
        else AutoModelForCausalLM
    )


def decoder_start(config: Any) -> int | None:
    """Return the token that the decoder of an encoder-decoder starts with; None if the config names
    none, or is of another model."""
    if not config.is_encoder_decoder:
        return None
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:  # T5Gemma
        start = getattr(config.get_text_config(decoder=True), "bos_token_id", None)
    return start


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
