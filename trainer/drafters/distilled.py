"""What drafters share that learn the target's own distributions instead of the rows' tokens.

    L = Σ_k w_k Σ_t loss(p_{t+k}, q_k[t])        p_t = softmax(head(h_t)), the target's for x_{t+1}        q_k[t] the k-th draft's

The losses are trainer.drafters.distillation's. A position counts for offset k where x_{t+1+k} is
trained and of t's row, as for all drafters. With tokens that the target wrote itself, greedily, the
target's best guess is the row's token.

A drafter may also predict whether its tokens are taken, for a policy that ends drafts early
(trainer.decoding.trees.hopeful):

    c_k[t] = σ(w·R_3(R_2(R_1(z))) + b)        R(z) = z + SiLU(W z + a)        z (d,) what q_k[t]'s head reads, without a gradient to it
    L += v Σ_k w_k Σ_t BCE(c_k[t], α_k[t])    α = Σ min(p, q)

R_1 to R_3 and one linear layer are SpecDec++'s head (Huang et al. 2024, arXiv 2405.19715; three
blocks is what its authors take, and their code runs one of them three times). Theirs reads the
state behind a drafted token and learns that token's own chance min(1, p / q), of tokens drawn from
the draft after some of the target's, with six times the weight on its refusal. Here both
distributions are known, so that what is learned is α, the mean of that chance over all that could
be drawn, without drawing: as DSpark's confidence head does. A weight on refusals would bend what is
predicted, as a lower threshold of the policy does, so there is none.

c is for a token drawn from q and a target sampled as it is; for greedy decoding, another
temperature and siblings, which all have the c of
the state that they are drawn from, it is a stand-in. W = a = w = 0 and b = log(0.7 / 0.3) at the
start, about where trained heads end: EAGLE-3's first token at Qwen3-4B is taken 0.81 times on
mathematics and 0.53 times on chats (DSpark's authors).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.drafters import DrafterError, Seen, Target, targets_of
from trainer.drafters.distillation import KINDS, Distillation, chunked_distillation
from trainer.drafters.layers import Heads, precision
from trainer.drafters.medusa import ResidualBlock
from trainer.models.heads import Head


class Distilled(Heads):
    """A drafter whose `states` are turned into logits by `heads` and held against the target's;
    numbers are (K, 7), with Σ min(p, q) and the product of those of all offsets up to it behind
    what every drafter counts, and guesses held against the target's best. Where it predicts
    acceptance they are (K, 8), with how far it is off behind those.

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
        self.confidence: nn.ModuleList | None = None
        self.confidence_weight = 0.0

    def predict_acceptance(self, model: Any, weight: float | None, count: int) -> None:
        """Add `count` fp32 heads that predict acceptance, one for all offsets or one for each; none
        where `weight` is None. To be called when all else is made, so that it starts as it would
        without.

        Raises:
            DrafterError: the weight is not above 0.
        """
        if weight is None:
            return
        if not 0 < weight < math.inf:
            raise DrafterError(
                f"drafter.confidence={weight}: a weight above 0 of its loss beside the draft's, or"
                " null for no such head"
            )
        size, device = (
            model.config.get_text_config().hidden_size,
            model.get_output_embeddings().weight.device,
        )
        self.confidence_weight = weight
        self.confidence = nn.ModuleList(_acceptance_head(size, device) for _ in range(count))

    def predicted(self, offset: int, states: Float[Tensor, "m d"]) -> Float[Tensor, " m"] | None:
        """The chance in fp32 that a token of this offset is taken which is drawn from the logits of
        these states, what a Growth says of it; None without a head."""
        return (
            None if self.confidence is None else self._acceptance_logits(offset, states).sigmoid()
        )

    def _acceptance_logits(self, offset: int, states: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        heads: Any = self.confidence
        head = heads[(offset - 1) % len(heads)]
        with precision(states):
            return head(states.to(head[-1].weight.dtype)).squeeze(-1).float()

    @property
    def vocabulary(self) -> Int[Tensor, " v"] | None:
        """Target ids of the logits' places, ascending; None for all."""
        return None

    def draft_heads(self, target: Target) -> tuple[Head, ...]:
        """From `states` to logits (n, v): one for all offsets, or one for each. The target's own by
        default."""
        return (target.head,)

    def head_parameters(self) -> tuple[nn.Parameter, ...]:
        """What those train."""
        return ()

    def loss(self, seen: Seen, target: Target, chunk: int) -> tuple[Tensor, Tensor]:
        seen = replace(seen, hidden=seen.hidden.detach())
        total, beside, numbers, _ = self.distilled(
            seen, target, chunk, self.counted_states(seen, target)
        )
        return total + beside, numbers

    def counted_states(self, seen: Seen, target: Target) -> Iterator[Float[Tensor, "B T d"]]:
        """`states` of which a loss uses an offset's targets only (`targets_of`): anything finite
        may stand at other positions."""
        return self.states(seen, target)

    def distilled(
        self, seen: Seen, target: Target, chunk: int, states: Iterator[Float[Tensor, "B T d"]]
    ) -> tuple[Tensor, Tensor, Tensor, Float[Tensor, "K n d"]]:
        """(loss, that of predicted acceptance, numbers, states at the target's positions): row i of
        those predicts what the target's i-th position of a trained token predicts, drafted from k
        positions earlier; `where_taught` tells which positions those are. The second is 0 without
        such a head."""
        taught = where_taught(seen)
        drafts, counted = [], []
        for k, hidden in enumerate(states, 1):
            where, _ = targets_of(k, seen.labels, seen.positions)
            drafts.append(hidden.roll(k, dims=1)[taught])
            counted.append(where.roll(k, dims=1)[taught])
        hidden, counts = torch.stack(drafts), torch.stack(counted).float()
        how = Distillation(
            self.kind, target.head, self.draft_heads(target), self.vocabulary, self.eta
        )
        weights = counts * counts.new_tensor(self.weights).unsqueeze(1)
        total, found = chunked_distillation(
            hidden, seen.hidden[taught], weights, how, chunk, self.head_parameters()
        )
        loss, best, among, acceptance = found * counts
        # A draft of k tokens has its j-th one at a position j earlier: what counts together stands
        # on a diagonal of (t, k).
        numbers = torch.stack(
            [
                loss.sum(1),
                counts.sum(1),
                best.sum(1),
                among.sum(1),
                *_unbroken(best, acceptance, taught),
            ],
            dim=1,
        )
        numbers = torch.cat(
            [numbers[:, :5], acceptance.sum(1, keepdim=True), numbers[:, 5:]], dim=1
        )
        beside = total.new_zeros(())
        if self.confidence is not None:
            # Positions that the loss leaves out, where a draft vocabulary lacks the best token,
            # count here: they are refused often.
            logits = torch.stack(
                [self._acceptance_logits(k, states) for k, states in enumerate(hidden.detach(), 1)]
            )
            loss = F.binary_cross_entropy_with_logits(logits, acceptance, reduction="none")
            beside = self.confidence_weight * (weights * loss).sum()
            apart = (logits.detach().sigmoid() - acceptance).abs() * counts
            numbers = torch.cat([numbers, apart.sum(1, keepdim=True)], dim=1)
        return total, beside, numbers, hidden


def _acceptance_head(size: int, device: torch.device) -> nn.Sequential:
    last = nn.Linear(size, 1, device=device, dtype=torch.float32)
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, math.log(0.7 / 0.3))
    return nn.Sequential(*(ResidualBlock(size, device) for _ in range(3)), last)


def where_taught(seen: Seen) -> Tensor:
    """The positions t (B, T) whose next token is trained: those at which the target's distribution
    is a teacher for some offset."""
    where = torch.zeros_like(seen.labels, dtype=torch.bool)
    where[:, :-1] = (seen.labels[:, 1:] != -100) & (
        seen.positions[:, 1:] == seen.positions[:, :-1] + 1
    )
    return where


def _unbroken(best: Tensor, acceptance: Tensor, taught: Tensor) -> tuple[Tensor, Tensor]:
    """For each offset, how often its guess and those of all offsets before were right, and the sum
    of the products of acceptances."""
    right = best.new_ones(taught.shape)
    chance = right.clone()
    found = []
    for k in range(len(best)):
        # Both are kept at the position that the draft starts from, which is k + 1 before the one
        # that offset k + 1 is taught by.
        at, likely = torch.zeros_like(right), torch.zeros_like(right)
        at[taught], likely[taught] = best[k], acceptance[k]
        right = right * at.roll(-k - 1, dims=1)
        chance = chance * likely.roll(-k - 1, dims=1)
        found.append(torch.stack([right.sum(), chance.sum()]))
    unbroken, products = torch.stack(found).unbind(1)
    return unbroken, products
