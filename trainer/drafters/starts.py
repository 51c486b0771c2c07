"""Weights of a target that a head's parts start from (drafter.init=last_layer)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from adapters.linear import features, float_weight, is_linear
from trainer.drafters import DrafterError


def copy_weights(source: nn.Module, into: nn.Module, besides: Collection[str] = ()) -> None:
    """Copy the tensors of `source` that `into` has, dequantised if they are packed, but not those
    of the submodules `besides`. Where one of them is on the meta device nothing happens."""
    if any(next(module.parameters()).is_meta for module in (source, into)):
        return
    with torch.no_grad():
        for name, module in into.named_modules():
            if name in besides:
                continue
            original: Any = source.get_submodule(name)
            for key, tensor in _tensors(module):
                packed = key == "weight" and is_linear(original)
                tensor.copy_(float_weight(original) if packed else getattr(original, key))


def copy_layer(source: nn.Module, into: nn.Module, besides: Collection[str] = ()) -> None:
    """Copy the weights of a target's decoder layer, as `copy_weights` does.

    Raises:
        DrafterError: it lacks a tensor of `into`, or has it in another shape.
    """
    for name, module in into.named_modules():
        if name in besides:
            continue
        try:
            original: Any = source.get_submodule(name)
        except AttributeError:
            original = None
        for key, tensor in _tensors(module):
            shape = _shape(original, key)
            if shape != tuple(tensor.shape):
                raise DrafterError(
                    f"drafter.init=last_layer copies a {type(source).__name__} of the target, and"
                    f" its {name}.{key} is {'missing' if shape is None else f'of shape {shape}'},"
                    f" where the head's is of shape {tuple(tensor.shape)}: set drafter.init=random"
                )
    copy_weights(source, into, besides)


@torch.no_grad()
def pass_last(linear: nn.Linear) -> None:
    """Let a linear layer return the last of the concatenated vectors that it reads: [0 .. 0 I]."""
    weight = linear.weight
    size = weight.shape[0]
    weight.zero_()
    weight[:, -size:] = torch.eye(size, device=weight.device)


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _shape(module: Any, key: str) -> tuple[int, ...] | None:
    """Return the shape of a module's tensor, unpacked; None if there is none."""
    if module is None or getattr(module, key, None) is None:
        return None
    if key == "weight" and is_linear(module):
        inputs, outputs = features(module)
        return outputs, inputs
    return tuple(getattr(module, key).shape)
