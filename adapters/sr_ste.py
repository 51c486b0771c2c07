"""SR-STE: full fine-tuning of weights in the pattern 2:4 (Zhou et al. 2021, arXiv 2102.04010).

    y = (M ⊙ W) x + b          M = 1 at the two largest |W| of every four neighbouring inputs
    g = dL/d(M ⊙ W) + λ (1 - M) ⊙ W          the gradient of W that the optimiser gets

    W (o, i)  dense, trained; an entry that is left out still learns, and may come back
    λ         `decay`, a pull of such entries to zero, so that the choice settles

The result is M ⊙ W, a plain folder in the pattern. `flips` in the journal is the share of M's
entries that a step has changed; it should fall.

Differs from the paper: λ is added once a step to the step's whole gradient, before clipping and the
optimiser (as in arXiv 2404.01847), not in each backward pass. M is chosen in each forward pass.
Rows and columns together, sparse gradients and a dense end of that later paper are not built.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from adapters import two_of_four
from adapters.delta import Start
from adapters.full import Full
from adapters.targets import targets


class _Masked(torch.autograd.Function):
    """M ⊙ W, with the gradient of the identity: the straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight * two_of_four.keep(weight.abs())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


class TwoOfFourLinear(nn.Linear):
    """A linear layer that multiplies by M ⊙ W. Its weight is W."""

    def forward(self, input: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        return F.linear(input, _Masked.apply(self.weight), self.bias)


def layers(model: nn.Module) -> Iterator[TwoOfFourLinear]:
    """Yield the layers that are in the pattern."""
    return (module for module in model.modules() if isinstance(module, TwoOfFourLinear))


class SrSte(Full):
    """Full fine-tuning with the linear layers of `target_modules` in the pattern 2:4."""

    def __init__(
        self,
        decay: float,
        target_modules: str | list[str],
        exclude_modules: Sequence[str],
    ):
        self.decay = decay
        self.target_modules, self.exclude_modules = target_modules, list(exclude_modules)
        self.masks: list[Tensor] = []  # of the step before, to count flips
        self.flips: float | None = None

    def attach(self, model: nn.Module, start: Start) -> nn.Module:
        chosen = targets(model, self.target_modules, self.exclude_modules, start.new_modules)
        for name, linear in chosen:
            two_of_four.refuse_unfit(name, linear, "sr_ste")
        for _, linear in chosen:
            # The parameter stays, and with it the names of checkpoints and the tying of weights.
            linear.__class__ = TwoOfFourLinear
        return super().attach(model, start)

    @torch.no_grad()
    def before_step(self, model: nn.Module, loss_scale: float) -> None:
        masks = []
        for layer in layers(model):
            mask = two_of_four.keep(layer.weight.abs())
            if layer.weight.grad is not None:
                layer.weight.grad.add_(layer.weight * ~mask, alpha=self.decay)
            masks.append(mask)
        if self.masks:
            changed = sum((now != then).sum() for now, then in zip(masks, self.masks, strict=True))
            self.flips = float(changed) / sum(mask.numel() for mask in masks)
        self.masks = masks

    def after_step(self, model: nn.Module, step: int) -> dict[str, float] | None:
        return None if self.flips is None else {"flips": self.flips}

    @torch.no_grad()
    def merge(self, model: nn.Module) -> nn.Module:
        for layer in layers(model):
            layer.weight.copy_(layer.weight * two_of_four.keep(layer.weight.abs()))
        layer_class: Any = nn.Linear
        for layer in list(layers(model)):
            layer.__class__ = layer_class
        return super().merge(model)
