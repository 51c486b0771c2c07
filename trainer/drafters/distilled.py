"""The base of drafters that learn the target's own distributions instead of the rows' tokens.

    L = Σ_k w_k Σ_t loss(p_{t+k}, q_k[t])
    p_t = softmax(head(h_t)), the target's distribution of x_{t+1}; q_k[t] is the k-th draft's

The losses are those of trainer.drafters.distillation. A position counts for offset k if x_{t+1+k}
is trained and in t's row, as for all drafters. For tokens that the target wrote itself, greedily,
the target's best guess is the row's token.

A drafter may also predict whether its tokens are accepted, for a policy that ends drafts early
(trainer.decoding.trees.refusal_policy):

    c_k[t] = σ(w·R_3(R_2(R_1(z))) + b)        R(z) = z + SiLU(W z + a)
    L += v Σ_k w_k Σ_t BCE(c_k[t], α_k[t])    α = Σ min(p, q)

z (d,) is the input of q_k[t]'s head, without a gradient to it. R_1 to R_3 and one linear layer are
SpecDec++'s head (Huang et al. 2024, arXiv 2405.19715; three blocks is its authors' number, and
their code runs one of them three times).

c predicts the acceptance of a token drawn from q, with a target sampled without changes. For greedy
decoding, another temperature and siblings (which all have the c of the state they are drawn from)
it is an approximation. At the start W = a = w = 0 and b = log(0.7 / 0.3), about where trained heads
end: EAGLE-3's first token at Qwen3-4B is accepted 0.81 times on mathematics and 0.53 times on chats
(DSpark's authors).

Differs from the paper:
    SpecDec++'s head reads the state after a drafted token and learns that token's own probability
    min(1, p / q), of tokens drawn from the draft after some of the target's, with six times the
    weight on its refusal. Here both distributions are known, so the head learns α, the mean of that
    probability over all tokens that could be drawn, without drawing, as DSpark's confidence head
    does. There is no weight on refusals: it would distort the prediction in the same way as a lower
    threshold of the policy.
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

from trainer.drafters import DrafterError, Target, TargetOutput
from trainer.drafters.distillation import KINDS, Distillation, chunked_distillation
from trainer.drafters.layers import Heads, autocast_like
from trainer.drafters.medusa import ResidualBlock
from trainer.models.heads import Head
from trainer.models.on_host import Host, flat, offset_mask, picked, placed, sent


class Distilled(Heads):
    """A drafter whose `states` are turned into logits by `draft_heads` and compared with the
    target's.

    Numbers are (K, 7): those of every drafter, with guesses compared with the target's best, then
    Σ min(p, q), then the product of those of all offsets up to it. If it predicts acceptance they
    are (K, 8), with the prediction's error last.

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
        self.topk: int | None = None  # HASS's loss, see Distillation
        self.topk_weight = 1.0
        self.confidence: nn.ModuleList | None = None
        self.confidence_weight = 0.0

    def predict_acceptance(self, model: Any, weight: float | None, count: int) -> None:
        """Add `count` fp32 heads that predict acceptance, one for all offsets or one for each; none
        if `weight` is None. Call it last, so that everything else starts as it would without.

        Raises:
            DrafterError: the weight is not above 0.
        """
        if weight is None:
            return
        if not 0 < weight < math.inf:
            raise DrafterError(
                f"drafter.confidence={weight}: expected a weight above 0 for its loss, or null for"
                " no such head"
            )
        size, device = (
            model.config.get_text_config().hidden_size,
            model.get_output_embeddings().weight.device,
        )
        self.confidence_weight = weight
        self.confidence = nn.ModuleList(_acceptance_head(size, device) for _ in range(count))

    def predicted(self, offset: int, states: Float[Tensor, "m d"]) -> Float[Tensor, " m"] | None:
        """Return the predicted acceptance, in fp32, of a token of this offset that is drawn from
        the logits of these states; None without such a head."""
        return (
            None if self.confidence is None else self._acceptance_logits(offset, states).sigmoid()
        )

    def _acceptance_logits(self, offset: int, states: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        heads: Any = self.confidence
        head = heads[(offset - 1) % len(heads)]
        with autocast_like(states):
            return head(states.to(head[-1].weight.dtype)).squeeze(-1).float()

    @property
    def vocabulary(self) -> Int[Tensor, " v"] | None:
        """Target ids of the logits' entries, ascending; None for all."""
        return None

    def draft_heads(self, target: Target) -> tuple[Head, ...]:
        """Return the functions from `states` to logits (n, v): one for all offsets, or one for
        each. By default the target's own head."""
        return (target.head,)

    def head_parameters(self) -> tuple[nn.Parameter, ...]:
        """Return the trained parameters of `draft_heads`."""
        return ()

    def loss(self, output: TargetOutput, target: Target, chunk: int) -> tuple[Tensor, Tensor]:
        output = replace(output, hidden=output.hidden.detach())
        total, confidence, numbers, _ = self.distilled(
            output, target, chunk, self.counted_states(output, target)
        )
        return total + confidence, numbers

    def counted_states(
        self, output: TargetOutput, target: Target
    ) -> Iterator[Float[Tensor, "B T d"]]:
        """Yield `states` for a loss that uses an offset's targets only (`offset_mask`); other
        positions may hold any finite value."""
        return self.states(output, target)

    def distilled(
        self,
        output: TargetOutput,
        target: Target,
        chunk: int,
        states: Iterator[Float[Tensor, "B T d"]],
    ) -> tuple[Tensor, Tensor, Tensor, Float[Tensor, "K n d"]]:
        """Return (loss, loss of predicted acceptance, numbers, states at the target's positions).

        Row i of these states predicts what the target's i-th position of a trained token predicts,
        drafted k positions earlier; `taught_positions` returns these positions. The second loss is
        0 without such a head."""
        taught, counts = taught_positions(output, self.offsets)
        hidden = torch.stack([picked(part.roll(k, 1), taught) for k, part in enumerate(states, 1)])
        how = Distillation(
            self.kind,
            target.head,
            self.draft_heads(target),
            self.vocabulary,
            self.eta,
            topk=self.topk,
            topk_weight=self.topk_weight,
        )
        weights = counts * sent(torch.tensor(self.weights), counts.device).unsqueeze(1)
        total, counted_numbers = chunked_distillation(
            hidden, picked(output.hidden, taught), weights, how, chunk, self.head_parameters()
        )
        loss, best, among, acceptance = counted_numbers * counts
        # The j-th token of a draft is predicted at a position j earlier, so the tokens of one draft
        # are on a diagonal of (t, k).
        numbers = torch.stack(
            [
                loss.sum(1),
                counts.sum(1),
                best.sum(1),
                among.sum(1),
                *_unbroken(best, acceptance, taught, output.labels.shape),
            ],
            dim=1,
        )
        numbers = torch.cat(
            [numbers[:, :5], acceptance.sum(1, keepdim=True), numbers[:, 5:]], dim=1
        )
        confidence_loss = total.new_zeros(())
        if self.confidence is not None:
            # Positions whose best token is not in the draft vocabulary have no loss, but count
            # here: their tokens are refused often.
            logits = torch.stack(
                [self._acceptance_logits(k, states) for k, states in enumerate(hidden.detach(), 1)]
            )
            loss = F.binary_cross_entropy_with_logits(logits, acceptance, reduction="none")
            confidence_loss = self.confidence_weight * (weights * loss).sum()
            error = (logits.detach().sigmoid() - acceptance).abs() * counts
            numbers = torch.cat([numbers, error.sum(1, keepdim=True)], dim=1)
        return total, confidence_loss, numbers, hidden


def _acceptance_head(size: int, device: torch.device) -> nn.Sequential:
    last = nn.Linear(size, 1, device=device, dtype=torch.float32)
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, math.log(0.7 / 0.3))
    return nn.Sequential(*(ResidualBlock(size, device) for _ in range(3)), last)


def taught_positions(
    output: TargetOutput, offsets: int
) -> tuple[Int[Tensor, " n"], Float[Tensor, "K n"]]:
    """Return (positions, counts): the flat indices b T + t of the positions t whose next token is
    trained, and for each offset k, 1 where this token is its target and 0 elsewhere. At these
    positions the target's distribution teaches a draft of k positions earlier."""
    host: Host = output.on_host()
    taught = flat(offset_mask(0, host.labels, host.positions))
    counts = [
        offset_mask(k, host.labels, host.positions).roll(k, dims=1).flatten()[taught]
        for k in range(1, offsets + 1)
    ]
    device = output.labels.device
    return sent(taught, device), sent(torch.stack(counts).float(), device)


def _unbroken(
    best: Tensor, acceptance: Tensor, taught: Int[Tensor, " n"], shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """Return for each offset how often its guess and all earlier offsets' guesses were right, and
    the sum of the products of acceptances."""
    right = best.new_ones(shape)
    chance = right.clone()
    sums = []
    for k in range(len(best)):
        # Both are stored at the position where the draft starts, k + 1 before the position that
        # teaches offset k + 1.
        at, likely = (placed(part[k], taught, shape) for part in (best, acceptance))
        right = right * at.roll(-k - 1, dims=1)
        chance = chance * likely.roll(-k - 1, dims=1)
        sums.append(torch.stack([right.sum(), chance.sum()]))
    unbroken, products = torch.stack(sums).unbind(1)
    return unbroken, products
