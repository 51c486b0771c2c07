"""A row's loss, and the sketch of its gradient.

    g   gradient of the row's mean loss over its trained tokens, at all P trained parameters
    x_k = Σ_{p : h(p) = k} s(p) g_p        k < d

h and s are a random place and a random sign of each parameter, drawn once from the seed: a count
sketch, a projection with one nonzero entry in each column. E<x, x'> = <g, g'>, with a variance of
about |g|² |g'|² / d, as a matrix of signs has, at a cost of P instead of P d.

Source: Charikar et al. 2002; Weinberger et al. 2009 (arXiv 0902.2206).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.assembly.trained import Trained
from trainer.data.batches import Collate, Pick
from trainer.data.held_out import to_device
from trainer.models.losses import CausalLoss, ClassLoss


class RowLoss:
    """The mean loss of single rows under a run's model, dropout off."""

    def __init__(self, run: Trained, collate: Collate):
        self.model: nn.Module = run.model.eval()
        self.collate = collate
        self.device = next(run.model.parameters()).device
        self.parameters = [p for p in run.model.parameters() if p.requires_grad]
        chunk = run.config["objective"]["logits_chunk"]
        label = run.task.kind == "label"
        self.loss: Any = ClassLoss(run.model) if label else CausalLoss(run.model, chunk)

    def _of(self, row: Any) -> Tensor:
        batch = self.collate([(Pick(0, True, 1), [row])])
        loss, sums = self.loss(to_device(batch, self.device))
        return loss / sums["tokens"].clamp_min(1)

    @torch.no_grad()
    def value(self, row: Any) -> np.ndarray:
        """Return a row's loss, (1,) float32."""
        return self._of(row).float().cpu().view(1).numpy()

    def gradient(self, row: Any) -> Tensor:
        """Return a row's gradient, (P,) float32."""
        grads = torch.autograd.grad(self._of(row), self.parameters, allow_unused=True)
        return torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).flatten().float()
                for p, g in zip(self.parameters, grads, strict=True)
            ]
        )


class Sketch:
    """The projection of gradients of P numbers to d."""

    def __init__(self, parameters: int, d: int, seed: int, device: torch.device):
        draw = torch.Generator().manual_seed(seed)
        self.d = d
        self.places = torch.randint(d, (parameters,), generator=draw).to(device)
        signs = torch.randint(2, (parameters,), generator=draw, dtype=torch.int8)
        self.signs = (2 * signs - 1).to(device)

    def __call__(self, gradient: Tensor) -> np.ndarray:
        """Return the sketch, (d,) float32. Sums are in float64, in an order of their own."""
        result = torch.zeros(self.d, dtype=torch.float64, device=gradient.device)
        result.index_add_(0, self.places, gradient.double() * self.signs)
        return result.float().cpu().numpy()
