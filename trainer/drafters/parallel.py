"""Independent heads, one for each offset (Gloeckle et al. 2024, arXiv 2404.19737, section 2).

    z_k = norm_k(Block_k(h))
    logits_k[t] = head(z_k[t]) predict x_{t+1+k}        L = Σ_k w_k Σ_t CE        w_k = 1

h (B, T, d) are the hidden states that the target's output head reads, Block_k is one decoder layer
of the target's family over h_1 .. h_t, norm_k the head's own final norm, and head the target's. The
heads do not read each other's tokens, so the tokens of a draft need not fit together.

Differs from the paper:
    The paper counts the target's own head as the first of n: its n is K + 1 here. Its heads read
    states before a final norm that all of them share; here h has passed the target's final norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache

from trainer.drafters import Target, TargetOutput, TargetUpdate
from trainer.drafters.independent import IndependentGrowth
from trainer.drafters.layers import (
    Heads,
    autocast_like,
    decoder_layer,
    final_norm,
    layer_inputs,
    run_layer,
)
from trainer.drafters.ragged import (
    IndependentBatch,
    RaggedMemory,
    padded,
    ragged_inputs,
)
from trainer.speed.roomy_cache import roomy


class Head(nn.Module):
    """A decoder layer and a norm: (B, T, d) to (B, T, d), both in fp32."""

    def __init__(self, model: Any, init: str):
        super().__init__()
        self.block = decoder_layer(model, init)
        self.norm = final_norm(model, init)

    def forward(self, hidden: Tensor, inputs: Any) -> Tensor:
        return self.norm(run_layer(self.block, hidden, inputs))


class ParallelHeads(Heads):
    """K parallel heads; conf/drafter/mtp_parallel.yaml documents the settings.

    Raises:
        DrafterError: there is not one weight for each offset, or the model's decoder layers cannot
        be built.
    """

    def __init__(
        self,
        model: Any,
        offsets: int,
        weights: list[float] | None,
        weight: float,
        init: str,
        detach: bool,
        lr_scale: float,
    ):
        super().__init__(offsets, weights, [1.0] * offsets, weight, detach, lr_scale)
        self.heads = nn.ModuleList(Head(model, init) for _ in range(offsets))

    def states(self, output: TargetOutput, target: Target) -> Iterator[Float[Tensor, "B T d"]]:
        hidden = self.in_own_dtype(output.hidden)
        inputs = layer_inputs(target, hidden, output.positions)
        for head in self.heads:
            with autocast_like(output.hidden):
                states = head(hidden, inputs)
            yield states.to(output.hidden.dtype)

    def start(self, target: Target) -> list[DynamicCache]:
        """Return one cache for each head. A head's states never depend on drafted tokens, so
        nothing is ever rolled back."""
        return [roomy(DynamicCache()) for _ in self.heads]

    @torch.no_grad()
    def grow(
        self, memory: list[DynamicCache], target: Target, update: TargetUpdate
    ) -> IndependentGrowth:
        entering = self.in_own_dtype(update.hidden.unsqueeze(0))
        before = memory[0].get_seq_length()
        positions = torch.arange(
            before, before + len(update.hidden), device=entering.device
        ).unsqueeze(0)
        newest = []
        for head, cache in zip(self.heads, memory, strict=True):
            # All heads run, also those that the draft will not use: their caches need these
            # positions.
            with autocast_like(update.hidden):
                states = head(entering, layer_inputs(target, entering, positions, cache))
            newest.append(states[0, -1:].to(update.hidden.dtype))
        return IndependentGrowth.read(target.head, torch.cat(newest))

    def start_batch(self, target: Target, count: int) -> RaggedMemory:
        return RaggedMemory.empty(len(self.heads), count)

    @torch.no_grad()
    def grow_batch(
        self, memory: RaggedMemory, target: Target, updates: Sequence[TargetUpdate]
    ) -> IndependentBatch:
        read = padded(updates)
        entering = self.in_own_dtype(read.hidden)
        places = memory.read(read.counts, 0, entering.device)
        newest = []
        for head, entries in zip(self.heads, memory.layers, strict=True):
            with autocast_like(read.hidden):
                states = head(entering, ragged_inputs(target, entering, places, entries))
            newest.append(read.newest(states).to(read.hidden.dtype))
        return IndependentBatch.read(target.head, torch.stack(newest, dim=1))

    def in_own_dtype(self, hidden: Tensor) -> Tensor:
        return hidden.to(next(self.parameters()).dtype)
