"""Facts of a model's config.json: the class that loads it, and code from elsewhere."""

from __future__ import annotations

import functools
import json
import os
import re
import socket
import urllib.parse
from pathlib import Path
from typing import Any

import huggingface_hub
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


def implementation_elsewhere(node: Any) -> str | None:
    """Return the first `key='value'` of a config.json that takes an implementation, of attention
    or others, from a repository; None if there is none."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if re.search("implementation", str(key)):
            # "sdpa" names an implementation of transformers; "org/name" one in a repository
            repositories = [
                str(name)
                for name in (value.values() if isinstance(value, dict) else [value])
                if not re.fullmatch(r"\w+", str(name))
            ]
            if repositories:
                return f"{key}={repositories[0]!r}"
        elif nested := implementation_elsewhere(value):
            return nested
    return None


@functools.cache
def hub_answers() -> bool:
    """Return whether the hub can be reached, at once."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    address = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT)
    if any(
        os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    ):
        return True  # only the proxy can tell
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=5).close()
    except OSError:
        return False
    return True
