"""Smooth counts of active neurons: 0 at 0, and near 1 far from it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def rational(a: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Return (q, dq/da) of q = a² / (a² + tau²)."""
    x = a / tau
    below = 1 / (1 + x * x)
    return x * x * below, x * below * below * (2 / tau)


def tanh(a: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Return (q, dq/da) of q = tanh(|a| / tau). The slope at 0 is set to 0."""
    q = torch.tanh(a.abs() / tau)
    return q, a.sign() * (1 - q * q) / tau


FORMS: dict[str, Callable[[Tensor, float], tuple[Tensor, Tensor]]] = {
    "rational": rational,
    "tanh": tanh,
}
