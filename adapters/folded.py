"""Weights with their deltas merged for a while, or for good, as decoding reads them.

While a model writes, token by token, the two small products of each LoRA layer cost as much as
their calls do, and decoding's own kernels compute plain layers only. Merged layers are as fast as
the base.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from adapters.delta import AdaptedLinear
from adapters.linear import float_weight

SPARE = 4  # merged weights may take a fourth of the free memory


@contextlib.contextmanager
def folded(model: nn.Module, available: float = float("inf")) -> Iterator[int]:
    """Merge the deltas of a model's linear layers into copies of their weights, put these layers
    where the adapted ones were, and yield how many were merged. At the end each layer is in its
    place with its own weight again, bit for bit: the tensor was only set aside. Layers that are
    quantised, shared, on a GPU or switched off are not merged, nor are corrections that no weight
    holds. No layer is merged if the copies need too much of the `available` bytes of memory."""
    layers = _layers(model, available)
    plain: list[tuple[AdaptedLinear, Tensor]] = []
    places = _places(model, layers)
    try:
        for layer in layers:
            layer.delta.take_out(layer.base)
            plain.append((layer, layer.base.weight.data))
            layer.base.weight.data = _merged(layer)
        for parent, name, layer in places:
            parent._modules[name] = layer.base
        yield len(layers)
    finally:
        for parent, name, layer in places:
            parent._modules[name] = layer
        for layer, weight in plain:
            layer.base.weight.data = weight
            layer.delta.fold_in(layer.base)


def merge_to_write(model: nn.Module, available: float = float("inf")) -> int:
    """Merge the layers that `folded` merges for good, for a model that only writes from now on, and
    return how many. Each gets a parameter of its own: models that share the base's keep theirs."""
    layers = _layers(model, available)
    for parent, name, layer in _places(model, layers):
        layer.delta.take_out(layer.base)
        layer.base.weight = nn.Parameter(_merged(layer), requires_grad=False)
        parent._modules[name] = layer.base
    return len(layers)


@torch.no_grad()
def _merged(layer: AdaptedLinear) -> Tensor:
    """Return a layer's merged weight, given one whose delta is taken out."""
    merged: Tensor = layer.delta.weight(float_weight(layer.base)).to(layer.base.weight.dtype)
    return merged.contiguous()


def _places(
    model: nn.Module, layers: list[AdaptedLinear]
) -> list[tuple[nn.Module, str, AdaptedLinear]]:
    """Return where the layers are, as (parent, name, layer)."""
    chosen = {id(layer) for layer in layers}
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if isinstance(child, AdaptedLinear) and id(child) in chosen
    ]


def _layers(model: nn.Module, available: float) -> list[AdaptedLinear]:
    """Return the layers to merge, none where the copies need too much memory."""
    modules = list(model.modules())
    uses: Counter[int] = Counter(
        id(parameter) for module in modules for parameter in module._parameters.values()
    )
    layers = [
        module
        for module in modules
        if isinstance(module, AdaptedLinear)
        and "forward" not in vars(module)
        and not getattr(module.delta, "sharded", False)
        and module.delta.has_weight
        and type(module.base) is nn.Linear
        and _is_plain(module.base.weight)
        and uses[id(module.base.weight)] == 1
    ]
    needed = sum(layer.base.weight.nbytes for layer in layers)
    return layers if needed * SPARE <= available else []


def _is_plain(weight: Any) -> bool:
    return (
        type(weight.data) is Tensor
        and weight.device.type == "cpu"
        and weight.is_floating_point()
        and not weight.requires_grad
    )
