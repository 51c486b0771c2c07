"""Medusa's heads (Cai et al. 2024, arXiv 2401.10774, section 2.1.1): no attention, and no memory in
decoding.

    z_k = R_{k,n}( .. R_{k,1}(h) .. )        R(h) = h + SiLU(W h + b)
    logits_k[t] = U_k z_k[t] predict x_{t+1+k}
    L = w r Σ_k β^k Σ_t CE        w = 0.2 and β = 0.8 are the authors', r = 1 without a `ramp`

h (B, T, d) are the hidden states that the target's output head reads. At the start W = 0 and b = 0,
so all heads are the target's own next-token head. U_k (V, d) is a trained copy of the target's
output layer for each head (`Medusa` with own_head), or the target's own for all of them (the
authors' version 2).

Medusa-1 trains the heads alone, Medusa-2 (section 2.2.2) with an adapter: detach=false, lr_scale=4,
and a ramp or a first stage without the adapter, as untrained heads would damage it.

Differs from the paper:
    The authors start b at random, and their code runs one block n times where n blocks are meant.
    Their self-distillation loss on the target's own head is left out: the task's loss is on tokens.

Tensors are named as in Medusa's files, after `heads.`: {k}.{j}.linear.weight (d, d) and .bias (d,)
of block j, both counted from 0, and {k}.{n}.weight (V, d). If the target's output layer has a bias
there is also a .bias, which their files have no place for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.drafters import DrafterError, Target, TargetOutput, TargetUpdate
from trainer.drafters.independent import IndependentGrowth
from trainer.drafters.layers import (
    Heads,
    autocast_like,
    head_of_layer,
    output_layer,
)
from trainer.drafters.ragged import IndependentBatch, RaggedMemory
from trainer.models.heads import Head


class ResidualBlock(nn.Module):
    """h + SiLU(W h + b) over the last dimension, in fp32; the identity at the start."""

    def __init__(self, size: int, device: torch.device):
        super().__init__()
        self.linear = nn.Linear(size, size, device=device, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + F.silu(self.linear(hidden))


class MedusaHeads(Heads):
    """K heads of `layers` residual blocks on the target's output head; conf/drafter/mtp_medusa.yaml
    documents the settings.

    Raises:
        DrafterError: there is not one weight for each offset, or there is less than one block.
    """

    def __init__(
        self,
        model: Any,
        offsets: int,
        layers: int,
        weights: list[float] | None,
        beta: float,
        weight: float,
        detach: bool,
        lr_scale: float,
    ):
        super().__init__(
            offsets, weights, [beta**k for k in range(1, offsets + 1)], weight, detach, lr_scale
        )
        if layers < 1:
            raise DrafterError(
                f"drafter.layers={layers}, but a head without a block is the target's own: set at"
                " least 1"
            )
        output: Any = model.get_output_embeddings()
        size = model.config.get_text_config().hidden_size
        self.blocks = layers
        self.heads = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(size, output.weight.device) for _ in range(layers)))
            for _ in range(offsets)
        )

    def states(self, output: TargetOutput, target: Target) -> Iterator[Float[Tensor, "B T d"]]:
        for k in range(1, self.offsets + 1):
            yield self._head_input(k, output.hidden)

    def start(self, target: Target) -> None:
        return None

    @torch.no_grad()
    def grow(self, memory: None, target: Target, update: TargetUpdate) -> IndependentGrowth:
        newest = update.hidden[-1:]
        return IndependentGrowth(
            self.offsets, lambda k: self.head_of(k, target)[0](self._head_input(k, newest))[0]
        )

    def start_batch(self, target: Target, count: int) -> RaggedMemory:
        return RaggedMemory.empty(0, count)

    @torch.no_grad()
    def grow_batch(
        self, memory: RaggedMemory, target: Target, updates: Sequence[TargetUpdate]
    ) -> IndependentBatch:
        newest = torch.stack([update.hidden[-1] for update in updates])
        return IndependentBatch(
            self.offsets, lambda k: self.head_of(k, target)[0](self._head_input(k, newest))
        )

    def _head_input(self, k: int, hidden: Tensor) -> Tensor:
        blocks: Any = self.heads[k - 1]
        with autocast_like(hidden):
            return blocks[: self.blocks](hidden.to(blocks[0].linear.weight.dtype)).to(hidden.dtype)


class Medusa(MedusaHeads):
    """Medusa's heads, with an output layer for each head if `own_head` is true;
    conf/drafter/medusa.yaml documents the settings.

    Raises:
        DrafterError: as MedusaHeads, or `ramp` has no known value.
    """

    def __init__(
        self,
        model: Any,
        offsets: int,
        layers: int,
        own_head: bool,
        weights: list[float] | None,
        beta: float,
        weight: float,
        ramp: str | int | None,
        detach: bool,
        lr_scale: float,
    ):
        super().__init__(model, offsets, layers, weights, beta, weight, detach, lr_scale)
        if ramp not in (None, "sine") and (not isinstance(ramp, int) or ramp < 1):
            raise DrafterError(f"drafter.ramp={ramp}: null, sine, or a number of steps from 1")
        self.ramp, self.ramp_factor, self.own_head = ramp, 1.0, own_head
        if own_head:
            for head in self.heads:
                head.append(output_layer(model))  # type: ignore[operator]

    def head_of(self, offset: int, target: Target) -> tuple[Head, tuple[nn.Parameter, ...]]:
        if not self.own_head:
            return super().head_of(offset, target)
        blocks: Any = self.heads[offset - 1]
        return head_of_layer(blocks[-1], target), tuple(blocks[-1].parameters())

    def on_step(self, step: int, steps: int) -> None:
        self.ramp_factor = ramp_factor(self.ramp, step, steps)

    def loss(self, output: TargetOutput, target: Target, chunk: int) -> tuple[Tensor, Tensor]:
        total, numbers = super().loss(output, target, chunk)
        return total * self.ramp_factor, numbers


def ramp_factor(ramp: str | int | None, step: int, steps: int) -> float:
    """Return the factor of the heads' loss at a step, counted from 0. With `sine` it is sin(π/2
    (step + 1) / steps), as in the authors' joint training with self-distilled data; with a number
    it rises linearly over that number of steps; with None it is 1."""
    if ramp is None:
        return 1.0
    if isinstance(ramp, int):
        return min(1.0, (step + 1) / ramp)
    return math.sin(math.pi / 2 * min(1.0, (step + 1) / max(1, steps)))
