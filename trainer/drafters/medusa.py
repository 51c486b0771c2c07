"""Medusa's heads (Cai et al. 2024, arXiv 2401.10774, section 2.1.1): no attention, and nothing to remember while decoding.

    z_k = R_{k,m}( .. R_{k,1}(h) .. )        R(h) = h + SiLU(W h + b)        logits_k[t] = head(z_k[t]) predict x_{t+1+k}
    L = w Σ_k β^k Σ_t CE        w = 0.2 and β = 0.8 are the authors'

h (B, T, d) are the hidden states that the target's output head reads. W = 0 and b = 0 at the start, where all heads are the target's own
next-token head; the authors leave b random. The output head is the target's for all of them, which their version 2 has, and not a
trained copy of (V, d) for each. Proposals are chains: the best of each head, no tree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.drafters import Draft, DrafterError, Seen, Target
from trainer.drafters.layers import Heads, drafted, precision


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
    """K heads of `layers` residual blocks; conf/drafter/mtp_medusa.yaml says what the knobs mean.

    Raises:
        DrafterError: the weights are not of K offsets, or there is less than one block.
    """

    def __init__(
        self, model: Any, offsets: int, layers: int, weights: list[float] | None, beta: float, weight: float, detach: bool,
        lr_scale: float,
    ):  # fmt: skip
        super().__init__(offsets, weights, [beta**k for k in range(1, offsets + 1)], weight, detach, lr_scale)
        if layers < 1:
            raise DrafterError(f"drafter.layers={layers}, but a head without a block is the target's own: set at least 1")
        output: Any = model.get_output_embeddings()
        size = model.config.get_text_config().hidden_size
        self.heads = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(size, output.weight.device) for _ in range(layers))) for _ in range(offsets)
        )

    def states(self, seen: Seen, target: Target) -> Iterator[Float[Tensor, "B T d"]]:
        for head in self.heads:
            yield self._read(head, seen.hidden)

    def start(self, target: Target) -> None:
        return None

    @torch.no_grad()
    def propose(
        self, memory: None, target: Target, hidden: Float[Tensor, "n d"], ids: Int[Tensor, " n"], count: int,
        choose: Callable[[Float[Tensor, " V"]], tuple[Tensor, Tensor | None]],
    ) -> Draft:  # fmt: skip
        picks = [choose(target.head(self._read(head, hidden[-1:]))[0]) for head in self.heads[:count]]
        return drafted(picks, ids)

    def _read(self, head: nn.Module, hidden: Tensor) -> Tensor:
        with precision(hidden):
            return head(hidden.to(next(self.parameters()).dtype)).to(hidden.dtype)
