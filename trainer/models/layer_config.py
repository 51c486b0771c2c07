"""Settings of one layer, where a config has values that differ between layers."""

from __future__ import annotations

from typing import Any


def of_layer(config: Any, index: int = -1) -> Any:
    """Return transformers' config of one decoder layer; the config itself where all are alike.

    A config whose head width or number of key heads differs between layers, as Gemma 4's, raises
    transformers' AmbiguousGlobalPerLayerAttributeError when such a value is read from it.
    """
    layers = getattr(config, "per_layer_config", None)
    return config if layers is None else layers[index]
