"""The layers of a model that an adapter can train: those that are called, on the way of a text.

Three kinds are not. The vision tower of a vision-language model, and what projects its states, are
called for images only. And some classes multiply by a layer's weight themselves, without calling
the layer, so that what is attached to it has no effect: Mamba does so with dt_proj, and with
out_proj where its fused kernel is installed (PEFT refuses that out_proj too), Gemma 3n with
correction_coefs while it trains, DeBERTa with in_proj, LongCat Flash with its router. And what a
class computes without gradients, as the indexers of sparse attention (DeepSeek V3.2, GLM 5).
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

from torch import nn

_ASKED = "dtype|device|shape|ndim|size|data|requires_grad|_is_hf_initialized"
_NEVER_READ = ("Bloom",)  # its classes read weights for a tensor parallelism that is never on


def trained_by_text(model: nn.Module) -> Callable[[str], bool]:
    """Return the function that says of a layer's name whether a text calls the layer."""
    inside = text_part(model)

    def reached(name: str) -> bool:
        if inside is not None and not name.startswith(inside):
            return False
        parent, _, child = name.rpartition(".")
        parent_class: Any = type(model.get_submodule(parent))
        parts = parent.split(".")
        outer = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        classes: list[Any] = [type(model.get_submodule(path)) for path in outer]
        if any(_without_gradients(kind) for kind in classes):
            return False
        return not _weight_is_read(parent_class, child)

    return reached


def text_part(model: Any) -> str | None:
    """Return the start of the names of the language model's layers in a model of several
    modalities; None where the whole model is one."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "get_text_config"):
        return None
    if config.get_text_config() is config or not hasattr(model, "get_decoder"):
        return None
    decoder: Any = model.get_decoder()
    return next(
        (f"{name}." for name, module in model.named_modules() if module is decoder and name), None
    )


@functools.cache
def _weight_is_read(parent: Any, child: str) -> bool:
    """Return whether a class computes with the weight of its layer `child`. To start it, or to ask
    for its type or shape, does not count."""
    if parent.__name__.startswith(_NEVER_READ):
        return False
    layer = re.escape(child)
    read = re.compile(
        rf"(isinstance\(|init\.\w+\(|nn\.Parameter\()?\s*\bself\.{layer}\.weight\b"
        rf"(?!\s*(\.({_ASKED})\b|=[^=]))"
    )
    source = "".join(
        _source(kind) for kind in parent.__mro__ if not kind.__module__.startswith("torch.")
    )
    return any(match.group(1) is None for match in read.finditer(source))


@functools.cache
def _without_gradients(kind: Any) -> bool:
    """Return whether a class's forward is decorated with torch.no_grad."""
    if kind.__module__.startswith("torch."):
        return False
    try:
        source = inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return False
    decorators = source.partition("def forward")[0]
    return re.search(r"@torch\.(no_grad|inference_mode)\b", decorators) is not None


@functools.cache
def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # made at run time, or without its file
        return ""
