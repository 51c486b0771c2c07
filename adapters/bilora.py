"""BiLoRA: LoRA whose factors have 2, 4 or 16 values each, and are trained so (Jie, Wang and Deng
2023, arXiv 2307.16867).

    y = W x + s B̂ Â x        s = alpha / r

    ŵ = q(u) σ + μ           u = (w - μ) / (σ + 1e-5)        for each entry w of A, and of B

    μ, σ  mean and standard deviation of all entries of the factor
    q     the nearest of 2^bits levels, the medians of the intervals into which they cut a standard
          normal: ±0.674 for one bit, ±0.378 and ±1.266 for two

A and B are trained as numbers, and used rounded: the gradient of ŵ is taken as that of w. B is zero
at the start and stays zero when rounded, so y starts as W x. The saved adapter is an ordinary LoRA
with Â and B̂. `graft compress method=levels` packs it to `bits` a parameter, without a loss.

Differs from the paper: its code keeps μ, σ and 1e-5 in the gradient. Where all entries are zero
that is the mean of the gradients for each of them, so that B would stay a constant; its adapters do
not start at zero. Here the gradient is that of w alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adapters.delta import Adapter
from adapters.lora import LoRA, LoRAAdapter, scaling

ROUNDS = 3000  # of 16 levels: the last one changes them by 1e-9


@functools.cache
def levels(bits: int) -> tuple[float, ...]:
    """Return the 2^bits levels of a standard normal, rising: each is the median of the interval
    that ends halfway to its neighbours."""
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    count = 2**bits
    points = normal.icdf((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for _ in range(ROUNDS):
        inner = normal.cdf((points[1:] + points[:-1]) / 2)
        below = torch.cat([ends[:1], inner, ends[1:]])
        points = normal.icdf((below[1:] + below[:-1]) / 2)
    return tuple(points.tolist())


def rounded(w: Float[Tensor, "*s"], bits: int) -> Float[Tensor, "*s"]:
    """Return ŵ of the module's docstring, in w's dtype."""
    points = torch.tensor(levels(bits), dtype=w.dtype, device=w.device)
    mean, spread = w.mean(), w.std()
    u = (w - mean) / (spread + 1e-5)
    nearest = torch.bucketize(u, (points[1:] + points[:-1]) / 2)
    return points[nearest] * spread + mean


class Straight(torch.autograd.Function):
    """`rounded`, with the gradient of its input."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, bits: int) -> Tensor:
        return rounded(w, bits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


class BiLoRA(LoRA):
    """The low-rank update of one linear layer, its factors rounded."""

    def __init__(
        self,
        linear: Any,
        rank: int,
        scale: float,
        dropout: float,
        dtype: torch.dtype,
        fused: bool,
        bits: int,
    ):
        super().__init__(linear, rank, scale, dropout, dtype, fused)
        self.bits = bits

    def factors(self) -> tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]:
        return Straight.apply(self.A, self.bits), Straight.apply(self.B, self.bits)


class BiLoRAAdapter(LoRAAdapter):
    """LoRA with factors of few values on the linear layers of a model."""

    def __init__(
        self,
        bits: int,
        rank: int,
        alpha: float,
        rslora: bool,
        dropout: float,
        target_modules: str | list[str],
        exclude_modules: list[str],
        lr_ratio: float,
        dtype: str,
        fused: bool,
        target_parameters: str | list[str],
        train_modules: Sequence[str],
    ):
        super().__init__(
            rank, alpha, rslora, dropout, target_modules, exclude_modules, lr_ratio, dtype, fused,
            target_parameters, train_modules,
        )  # fmt: skip
        self.bits = bits

    def make(self, linear: nn.Module) -> LoRA:
        scale = scaling(self.rank, self.alpha, self.rslora)
        return BiLoRA(linear, self.rank, scale, self.dropout, self.dtype, self.fused, self.bits)

    def stock_faults(self, settings: dict[str, Any], stored: dict[str, Any]) -> list[str]:
        return Adapter.stock_faults(self, settings, stored)

    def load_stock_folder(self, model: nn.Module, folder: Path) -> None:
        Adapter.load_stock_folder(self, model, folder)
