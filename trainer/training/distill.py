"""Distill: train a drafter alone, on the hidden states of its frozen target. The target is the
base, or the base and adapter of another run.

FineTune with adapter=none gives the same gradients, but also computes the target's own next-token
loss, from which nothing learns. The logits of that loss are 30 to 40 % of a forward pass of a small
model. A step's loss is

    L = Σ_ranks Σ_micro-batches D / N

    D = the drafter's weighted sum (Drafter.loss), N = trained tokens of the step
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trainer.drafters import Drafter, DrafterError, Target
from trainer.models.losses import CausalLoss
from trainer.models.on_host import count, supervised
from trainer.training.finetune import FineTune

# From a batch: the target's states (B, T, d) that its output head reads, and the states of
# Drafter.layers, concatenated (B, T, f).
States = Callable[[dict[str, Any]], tuple[Float[Tensor, "B T d"], Float[Tensor, "B T f"] | None]]


class DraftLoss(CausalLoss):
    """The drafter's loss of a batch. `states` returns the stored hidden states of a training batch.
    If it is None the target is run, as always in evaluation."""

    def __init__(
        self,
        model: nn.Module,
        chunk: int | None,
        drafter: Drafter,
        target: Target,
        states: States | None = None,
    ):
        super().__init__(model, chunk, drafter, target)
        self.states = states

    def __call__(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (summed loss, {loss, tokens, offsets}): the drafter's weighted loss, the trained
        tokens and the numbers of Drafter.loss. The second are detached."""
        stored = self.states if torch.is_grad_enabled() else None
        with torch.no_grad():
            hidden, features = stored(batch) if stored is not None else self.forward(batch)[:2]
        loss, offsets = self.drafted(batch, hidden, features, hidden[:, :0])
        return loss, {
            "loss": loss.detach(),
            "tokens": count(supervised(batch)),
            "offsets": offsets,
        }


class Distill(FineTune):
    """Trains the `drafter` of a frozen `model`. Everything else is as in FineTune.

    Raises:
        DrafterError: there is no drafter, or something of the model is trained.
    """

    counted = ("loss", "tokens")

    def make_loss(self, chunk: int | None) -> DraftLoss:
        if self.drafter is None:
            raise DrafterError(
                "objective=distill trains a drafter, and there is none: choose one, as in"
                " drafter=eagle3"
            )
        if any(parameter.requires_grad for parameter in self.model.parameters()):
            raise DrafterError("objective=distill trains the drafter only: set adapter=none")
        return DraftLoss(self.model, chunk, self.drafter, Target(self.model))
