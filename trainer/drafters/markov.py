"""DSpark's Markov heads (arXiv 2607.05147): what the token before a slot adds to its logits, W_2 b.

    y = W_1[the token before]
    vanilla   b = y
    gated     b = σ(G [u ; y] + g) ⊙ y
    rnn       [α ; β ; ω] = J [s ; y ; u] + j,   b = tanh ω
              s' = σ(α) ⊙ s + (1 - σ(α)) ⊙ tanh β is the next slot's s, 0 at the block's first

u (d,) is the slot's state, W_1 (V, r), W_2 (v, r) of v drafted tokens, G (r, d + r),
J (3 r, d + 2 r). W_2 starts at 0.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trainer.drafters import DrafterError
from trainer.drafters.layers import autocast_like, projection

KINDS = ("vanilla", "gated", "rnn")


class Markov(nn.Module):
    """A Markov head in fp32. s has r numbers for rnn, and none for the others.

    Raises:
        DrafterError: the kind is unknown.
    """

    def __init__(
        self, kind: str, model: Any, family: Any, vocabulary: int, rank: int, drafted: int
    ):
        super().__init__()
        if kind not in KINDS:
            raise DrafterError(f"drafter.markov={kind}: one of {', '.join(KINDS)}")
        size, device = family.config.hidden_size, next(model.parameters()).device
        self.kind, self.width = kind, rank if kind == "rnn" else 0
        self.w1 = nn.Embedding(vocabulary, rank, device=device, dtype=torch.float32)
        self.w2 = projection(model, rank, drafted)
        if device.type != "meta":
            nn.init.normal_(self.w1.weight, std=0.02)
            nn.init.zeros_(self.w2.weight)
        if kind == "vanilla":
            return
        widths = (size + rank, rank) if kind == "gated" else (size + 2 * rank, 3 * rank)
        self.mix = nn.Linear(*widths, device=device, dtype=torch.float32)
        if device.type != "meta":
            nn.init.normal_(self.mix.weight, std=0.02)
            nn.init.zeros_(self.mix.bias)

    def start(self, like: Float[Tensor, "*b d"]) -> Float[Tensor, "*b s"]:
        """Return s of blocks' first slots."""
        return like.new_zeros(*like.shape[:-1], self.width)

    def step(
        self, u: Float[Tensor, "*b d"], before: Int[Tensor, "*b"], s: Float[Tensor, "*b s"]
    ) -> tuple[Float[Tensor, "*b r"], Float[Tensor, "*b s"]]:
        """Return b and the next slot's s, in the dtype of `u`."""
        y = self.w1(before).to(u.dtype)
        if self.kind == "vanilla":
            return y, s
        with autocast_like(u):
            if self.kind == "gated":
                return self.mix(torch.cat([u, y], dim=-1)).sigmoid().to(u.dtype) * y, s
            alpha, beta, omega = self.mix(torch.cat([s, y, u], dim=-1)).chunk(3, dim=-1)
        keep = alpha.sigmoid()
        return omega.tanh().to(u.dtype), (keep * s + (1 - keep) * beta.tanh()).to(u.dtype)

    def blocks(
        self, u: Float[Tensor, "B A K d"], before: Int[Tensor, "B A K"]
    ) -> Float[Tensor, "B A K r"]:
        """Return b of all slots of whole blocks."""
        if not self.width:
            return self.step(u, before, self.start(u))[0]
        s, outputs = self.start(u[:, :, 0]), []
        for k in range(u.shape[2]):
            b, s = self.step(u[:, :, k], before[:, :, k], s)
            outputs.append(b)
        return torch.stack(outputs, dim=2)


def check_settings(
    markov_rank: int, markov: str, ce: float, l1: float, confidence: float | None
) -> None:
    """Refuse settings of a block drafter that contradict each other.

    Raises:
        DrafterError: they do.
    """
    if confidence is not None and not markov_rank:
        raise DrafterError(
            f"drafter.confidence={confidence} reads the Markov head: set drafter.markov_rank"
            " above 0, or drafter.confidence=null"
        )
    if markov != "vanilla" and not markov_rank:
        raise DrafterError(
            f"drafter.markov={markov} is a kind of Markov head, and drafter.markov_rank=0 is"
            " none: set a markov_rank above 0, or drafter.markov=vanilla"
        )
    if not ce + l1:
        raise DrafterError("drafter.ce=0 and drafter.l1=0 leave no loss: set one above 0")
