"""Independent heads, one for each offset (Gloeckle et al. 2024, arXiv 2404.19737, section 2).

    z_k = norm_k(Block_k(h))        logits_k[t] = head(z_k[t]) predict x_{t+1+k}        L = Σ_k w_k Σ_t CE        w_k = 1

h (B, T, d) are the hidden states that the target's output head reads, Block_k one decoder layer of
the target's family over
h_1 .. h_t, norm_k a final norm of the head's own, and head the target's. The paper counts the
target's own head as the first of n: its n is K + 1 here, and its heads' input comes before a final
norm that all of them share, where h has passed the target's. Heads know nothing of each other's
tokens, so a draft of several of them need not fit together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache

from trainer.drafters import News, Seen, Target
from trainer.drafters.layers import (
    Heads,
    Independent,
    around,
    decoder_layer,
    final_norm,
    precision,
    through,
)


class Head(nn.Module):
    """A decoder layer and a norm: (B, T, d) to (B, T, d), both in fp32."""

    def __init__(self, model: Any, init: str):
        super().__init__()
        self.block = decoder_layer(model, init)
        self.norm = final_norm(model, init)

    def forward(self, hidden: Tensor, surroundings: Any) -> Tensor:
        return self.norm(through(self.block, hidden, surroundings))


class ParallelHeads(Heads):
    """K heads side by side; conf/drafter/mtp_parallel.yaml says what the knobs mean.

    Raises:
        DrafterError: the weights are not of K offsets, or the model's decoder layers cannot be
        built.
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

    def states(self, seen: Seen, target: Target) -> Iterator[Float[Tensor, "B T d"]]:
        hidden = self._entering(seen.hidden)
        surroundings = around(target, hidden, seen.positions)
        for head in self.heads:
            with precision(seen.hidden):
                states = head(hidden, surroundings)
            yield states.to(seen.hidden.dtype)

    def start(self, target: Target) -> list[DynamicCache]:
        """One cache for each head; a head's states never depend on drafted tokens, so nothing is
        ever taken back."""
        return [DynamicCache() for _ in self.heads]

    @torch.no_grad()
    def grow(self, memory: list[DynamicCache], target: Target, news: News) -> Independent:
        entering = self._entering(news.hidden.unsqueeze(0))
        before = memory[0].get_seq_length()
        positions = torch.arange(
            before, before + len(news.hidden), device=entering.device
        ).unsqueeze(0)
        newest = []
        for head, cache in zip(self.heads, memory, strict=True):
            # Heads that are asked for nothing run too: their caches must know these positions.
            with precision(news.hidden):
                states = head(entering, around(target, entering, positions, cache))
            newest.append(states[0, -1:].to(news.hidden.dtype))
        return Independent(self.offsets, lambda k: target.head(newest[k - 1])[0])

    def _entering(self, hidden: Tensor) -> Tensor:
        return hidden.to(next(self.parameters()).dtype)
