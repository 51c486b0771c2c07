"""The pattern 2:4: of every four neighbouring inputs of a weight at most two are not zero, which
sparse tensor cores multiply faster (torch.sparse.to_sparse_semi_structured)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from adapters.errors import AdapterError


def keep(scores: Float[Tensor, "o i"]) -> Bool[Tensor, "o i"]:
    """Return the entries of the two largest scores of each four neighbours of a row; of equal ones
    the first."""
    parts = scores.unflatten(-1, (-1, 4))
    # An entry stays if fewer than two go before it: larger ones, and equal ones to its left.
    larger = parts.unsqueeze(-2) > parts.unsqueeze(-1)
    left = torch.ones(4, 4, dtype=torch.bool, device=scores.device).tril(-1)
    before = larger | ((parts.unsqueeze(-2) == parts.unsqueeze(-1)) & left)
    return (before.sum(-1) < 2).view(scores.shape)


def follows(weight: Float[Tensor, "o i"]) -> bool:
    """Return whether a weight has the pattern."""
    if weight.shape[-1] % 4:
        return False
    return bool((weight.unflatten(-1, (-1, 4)).count_nonzero(-1) <= 2).all())


def refuse_unfit(name: str, linear: Any, adapter: str) -> None:
    """Refuse a linear layer that cannot have the pattern, or is no plain one.

    Raises:
        AdapterError: names the layer.
    """
    refuse_other(name, linear, adapter)
    if linear.in_features % 4:
        raise AdapterError(
            f"adapter={adapter}: {name} has {linear.in_features} inputs, expected a multiple of 4:"
            " leave it out with adapter.exclude_modules"
        )


def refuse_other(name: str, linear: Any, adapter: str) -> None:
    """Refuse a linear layer whose weight is transposed or packed.

    Raises:
        AdapterError: names the layer.
    """
    if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
        raise AdapterError(
            f"adapter={adapter}: {name} is a {type(linear).__name__}, expected a plain nn.Linear:"
            " leave it out with adapter.exclude_modules, or choose another base"
        )
