"""Preparation for merging: tied weights that come apart, and layers that cannot take an update."""

from __future__ import annotations

from typing import Any

from torch import nn

from adapters.errors import AdapterError
from adapters.linear import is_packed, output_layer
from adapters.trained_copies import Trained


def untie(model: Any) -> None:
    """Untie the weights of the embedding and the output layer if one of them is adapted: an update
    that is merged into a tied weight would change both."""
    head = output_layer(model)
    if head is None:
        return
    embedding: Any = model.get_input_embeddings()
    inner = [_adapted(layer) for layer in (head, embedding)]
    if inner == [None, None]:
        return
    linear, table = inner[0] or head, inner[1] or embedding
    tied = getattr(linear, "weight", None) is table.weight
    if tied:
        linear.weight = nn.Parameter(table.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def _adapted(layer: Any) -> Any:
    """Return the frozen layer inside an adapted one: our name of it, or PEFT's."""
    if isinstance(layer, Trained):
        return None
    inner = getattr(layer, "base", None) or getattr(layer, "base_layer", None)
    return inner if isinstance(inner, nn.Linear | nn.Embedding) else None


def record_ties(model: Any) -> None:
    """Set the config's tie_word_embeddings to false if embedding and output layer differ: a loader
    would tie them again."""
    head = output_layer(model)
    if head is None or not getattr(model.config, "tie_word_embeddings", False):
        return
    if head.weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False


def refuse_quantised(linear: Any) -> None:
    """Refuse to merge into a quantised layer.

    Raises:
        AdapterError: the layer is quantised: rounding would erase the trained update.
    """
    if is_packed(linear):
        raise AdapterError(
            "the base is quantised: a merge would round the adapter away. Load it with"
            " base.quantization=none"
        )
