"""Medusa's heads (Cai et al. 2024, arXiv 2401.10774, section 2.1.1): no attention, and nothing to
remember while decoding.

    z_k = R_{k,n}( .. R_{k,1}(h) .. )        R(h) = h + SiLU(W h + b)        logits_k[t] = U_k z_k[t] predict x_{t+1+k}
    L = w r Σ_k β^k Σ_t CE        w = 0.2 and β = 0.8 are the authors', r = 1 but for a `ramp`

h (B, T, d) are the hidden states that the target's output head reads. W = 0 and b = 0 at the start,
where all heads are the target's own next-token head; the authors leave b random, and their code
runs one block n times where n blocks are meant. U_k (V, d) is a trained copy of the target's output
layer for each head (`Medusa` with own_head), or the target's own for all of them (their version 2).

Medusa-1 trains the heads alone, Medusa-2 (section 2.2.2) with an adapter: detach=false, lr_scale=4,
and a ramp or a first stage without the adapter, as untrained heads would spoil it. Their
self-distillation loss on the target's own head is not here: the task's is hard.

Tensors are named as in Medusa's files behind `heads.`: {k}.{j}.linear.weight (d, d) and .bias (d,)
of block j, both counted from 0, and {k}.{n}.weight (V, d), with a .bias that their files have no
place for where the target's output layer has one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.drafters import DrafterError, News, Seen, Target
from trainer.drafters.layers import Heads, Independent, output_layer, precision, read_by
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
    says what the knobs mean.

    Raises:
        DrafterError: the weights are not of K offsets, or there is less than one block.
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

    def states(self, seen: Seen, target: Target) -> Iterator[Float[Tensor, "B T d"]]:
        for k in range(1, self.offsets + 1):
            yield self._read(k, seen.hidden)

    def start(self, target: Target) -> None:
        return None

    @torch.no_grad()
    def grow(self, memory: None, target: Target, news: News) -> Independent:
        newest = news.hidden[-1:]
        return Independent(
            self.offsets, lambda k: self.head_of(k, target)[0](self._read(k, newest))[0]
        )

    def _read(self, k: int, hidden: Tensor) -> Tensor:
        blocks: Any = self.heads[k - 1]
        with precision(hidden):
            return blocks[: self.blocks](hidden.to(blocks[0].linear.weight.dtype)).to(hidden.dtype)


class Medusa(MedusaHeads):
    """Medusa's heads with output layers of their own where `own_head` says so;
    conf/drafter/medusa.yaml says what the knobs mean.

    Raises:
        DrafterError: as MedusaHeads, or `ramp` is none of its ways.
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
        self.ramp, self.risen, self.own_head = ramp, 1.0, own_head
        if own_head:
            for head in self.heads:
                head.append(output_layer(model))  # type: ignore[operator]

    def head_of(self, offset: int, target: Target) -> tuple[Head, tuple[nn.Parameter, ...]]:
        if not self.own_head:
            return super().head_of(offset, target)
        blocks: Any = self.heads[offset - 1]
        return read_by(blocks[-1], target), tuple(blocks[-1].parameters())

    def at(self, step: int, steps: int) -> None:
        self.risen = risen(self.ramp, step, steps)

    def loss(self, seen: Seen, target: Target, chunk: int) -> tuple[Tensor, Tensor]:
        total, numbers = super().loss(seen, target, chunk)
        return total * self.risen, numbers


def risen(ramp: str | int | None, step: int, steps: int) -> float:
    """The factor of the heads' loss at a 0-based step of a run's: sin(π/2 (step + 1) / steps) with
    `sine`, as the authors' joint training with self-distilled data has it; rising linearly over so
    many steps with a number; 1 with None."""
    if ramp is None:
        return 1.0
    if isinstance(ramp, int):
        return min(1.0, (step + 1) / ramp)
    return math.sin(math.pi / 2 * min(1.0, (step + 1) / max(1, steps)))
