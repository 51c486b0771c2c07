"""The name under which transformers' models, decoder layers and mask functions take a cache.

transformers 5.24 renamed `past_key_values` to `cache`; some families' layers say `layer_past`, and
state-space models `cache_params`. RWKV takes and returns a `state`, which is no object of
transformers' caches. The name is read from the signature, whatever the version.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

NAMES = ("cache", "past_key_values", "layer_past", "past_key_value", "cache_params", "state")
BARE = "state"  # the name of a cache that the model makes itself: the first pass gets None


def cache_argument(function: Callable[..., Any]) -> str | None:
    """Return the name of the cache among a function's arguments, None if it takes none."""
    return _cache_argument(getattr(function, "__func__", function))


@functools.cache
def _cache_argument(function: Callable[..., Any]) -> str | None:
    arguments = inspect.signature(function).parameters
    return next((name for name in NAMES if name in arguments), None)


def with_cache(function: Callable[..., Any], cache: Any) -> dict[str, Any]:
    """Return the keyword argument that hands a cache to a function.

    Raises:
        TypeError: the function takes no cache.
    """
    name = cache_argument(function)
    if name is None:
        raise TypeError(f"{function} takes no cache: none of {', '.join(NAMES)} is an argument")
    return {name: cache}


def model_with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """Return the keyword argument that hands a cache to a model. PEFT's wrapper passes it on, and
    has no such argument itself."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return with_cache(inner.forward, cache)


def takes_a_cache(model: Any) -> bool:
    """Return whether a model reads a text bit by bit. The first GPT reads it whole for each
    token."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    # A model that is none of transformers' is a table of a test, whose caller knows.
    return not isinstance(inner, PreTrainedModel) or cache_argument(inner.forward) is not None


def makes_its_own(model: Any) -> bool:
    """Return whether a model's first pass takes no cache and returns one: RWKV's state, or the
    class of cache that MiniMax demands."""
    return next(iter(model_with_cache(model, None))) == BARE or not _takes_dynamic_cache(model)


def rolls_back(model: Any) -> bool:
    """Return whether the last tokens can be taken out of a model's cache, as drafting needs."""
    if getattr(model, "_is_stateful", False) or not takes_a_cache(model):
        return False
    return _takes_dynamic_cache(model)


def _takes_dynamic_cache(model: Any) -> bool:
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    return supports is None or bool(supports())


def cache_of(values: Any, default: Any = None) -> Any:
    """Return the cache among a model's outputs, or among keyword arguments; `default` if there is
    none. RecurrentGemma writes to the cache that it gets, and does not return it."""
    return next((values[name] for name in NAMES if name in values), default)
