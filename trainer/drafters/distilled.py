"""What drafters share that learn the target's own distributions instead of the rows' tokens.

    L = Σ_k w_k Σ_t loss(p_{t+k}, q_k[t])        p_t = softmax(head(h_t)), the target's for x_{t+1}        q_k[t] the k-th draft's

The losses are trainer.losses.Distillation's. A position counts for offset k where x_{t+1+k} is trained and of t's row, as for all
drafters. With tokens that the target wrote itself, greedily, the target's best guess is the row's token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trainer.drafters import DrafterError, Seen, Target, targets_of
from trainer.drafters.layers import Heads
from trainer.losses import KINDS, Distillation, Head, chunked_distillation


class Distilled(Heads):
    """A drafter whose `states` are turned into logits by `heads` and held against the target's; numbers are (K, 7), with Σ min(p, q)
    and the product of those of all offsets up to it behind what every drafter counts, and guesses held against the target's best.

    Raises:
        DrafterError: an unknown `loss`.
    """

    def __init__(
        self,
        offsets: int,
        weights: list[float] | None,
        default: list[float],
        weight: float,
        lr_scale: float,
        loss: str,
        eta: float,
    ):
        super().__init__(offsets, weights, default, weight, True, lr_scale)
        if loss not in KINDS:
            raise DrafterError(f"drafter.loss={loss}: one of {', '.join(KINDS)}")
        self.kind, self.eta = loss, eta

    @property
    def vocabulary(self) -> Int[Tensor, " v"] | None:
        """Target ids of the logits' places, ascending; None for all."""
        return None

    def draft_heads(self, target: Target) -> tuple[Head, ...]:
        """From `states` to logits (n, v): one for all offsets, or one for each. The target's own by default."""
        return (target.head,)

    def head_parameters(self) -> tuple[nn.Parameter, ...]:
        """What those train."""
        return ()

    def loss(self, seen: Seen, target: Target, chunk: int) -> tuple[Tensor, Tensor]:
        seen = replace(seen, hidden=seen.hidden.detach())
        total, numbers, _ = self.distilled(seen, target, chunk, self.states(seen, target))
        return total, numbers

    def distilled(
        self, seen: Seen, target: Target, chunk: int, states: Iterator[Float[Tensor, "B T d"]]
    ) -> tuple[Tensor, Tensor, Float[Tensor, "K n d"]]:
        """(loss, numbers, states at the target's positions): row i of those predicts what the target's i-th position of a trained token
        predicts, drafted from k positions earlier; `where_taught` tells which positions those are."""
        taught = where_taught(seen)
        drafts, counted = [], []
        for k, hidden in enumerate(states, 1):
            where, _ = targets_of(k, seen.labels, seen.positions)
            drafts.append(hidden.roll(k, dims=1)[taught])
            counted.append(where.roll(k, dims=1)[taught])
        hidden, counts = torch.stack(drafts), torch.stack(counted).float()
        how = Distillation(self.kind, target.head, self.draft_heads(target), self.vocabulary, self.eta)
        weights = counts * counts.new_tensor(self.weights).unsqueeze(1)
        total, found = chunked_distillation(hidden, seen.hidden[taught], weights, how, chunk, self.head_parameters())
        loss, best, among, acceptance = found * counts
        # A draft of k tokens has its j-th one at a position j earlier: what counts together stands on a diagonal of (t, k).
        numbers = torch.stack(
            [loss.sum(1), counts.sum(1), best.sum(1), among.sum(1), *_unbroken(best, acceptance, taught)], dim=1
        )
        return total, torch.cat([numbers[:, :5], acceptance.sum(1, keepdim=True), numbers[:, 5:]], dim=1), hidden


def where_taught(seen: Seen) -> Tensor:
    """The positions t (B, T) whose next token is trained: those at which the target's distribution is a teacher for some offset."""
    where = torch.zeros_like(seen.labels, dtype=torch.bool)
    where[:, :-1] = (seen.labels[:, 1:] != -100) & (seen.positions[:, 1:] == seen.positions[:, :-1] + 1)
    return where


def _unbroken(best: Tensor, acceptance: Tensor, taught: Tensor) -> tuple[Tensor, Tensor]:
    """For each offset, how often its guess and those of all offsets before were right, and the sum of the products of acceptances."""
    right = best.new_ones(taught.shape)
    chance = right.clone()
    found = []
    for k in range(len(best)):
        # Both are kept at the position that the draft starts from, which is k + 1 before the one that offset k + 1 is taught by.
        at, likely = torch.zeros_like(right), torch.zeros_like(right)
        at[taught], likely[taught] = best[k], acceptance[k]
        right = right * at.roll(-k - 1, dims=1)
        chance = chance * likely.roll(-k - 1, dims=1)
        found.append(torch.stack([right.sum(), chance.sum()]))
    unbroken, products = torch.stack(found).unbind(1)
    return unbroken, products
