"""Saved tensors copied into those of a live adapter."""

from __future__ import annotations

import torch
from torch import Tensor

from adapters.errors import AdapterError


def copy_tensors(into: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """Copy saved tensors into live ones of the same names: all of them, or none.

    Raises:
        AdapterError: a name, shape or dtype differs.
    """
    missing, unknown = sorted(into.keys() - saved.keys()), sorted(saved.keys() - into.keys())
    if missing or unknown:
        raise AdapterError(
            f"the saved adapter does not fit this model: {len(missing)} tensors are missing"
            f" {missing[:3]}, {len(unknown)} are unknown {unknown[:3]}. It was trained with another"
            " adapter or base."
        )
    for name, tensor in into.items():
        if (tensor.shape, tensor.dtype) != (saved[name].shape, saved[name].dtype):
            raise AdapterError(
                f"the saved adapter does not fit this model: {name} is {tuple(saved[name].shape)}"
                f" {saved[name].dtype} there and {tuple(tensor.shape)} {tensor.dtype} here. It was"
                " trained with another adapter or base."
            )
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(saved[name])
