"""Losses between a target's distributions and a drafter's, with no more of either than a chunk.

    L = Σ_k Σ_i w[k, i] loss(p_i, q_k,i)        p_i = softmax(head(h_i))        q_k,i a drafter's for the same token

K drafted distributions stand against each of the teacher's, which is computed once for all of them. As in trainer.losses, a chunk's
slopes at the logits are written out and taken through the head at once, so that no softmax outlives its chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from trainer.losses import Head

KINDS = ("ce", "kl", "tv", "lk_alpha", "lk_hybrid")


class _ChunkedDistillation(torch.autograd.Function):
    """Weighted sum of distillation losses of K predictions for each of n teacher's positions, chunk by chunk of positions.

    Forward: for each chunk, the teacher's probabilities once, and for each of the K the loss and its slope at the logits by hand, in
    fp32; then by autograd through the head the slopes at h_c and at the head's parameters. Backward: those times the incoming scalar.
    Shapes: hidden (K, n, d), teacher (n, d), weights (K, n); returns a scalar in fp32 and (4, K, n): loss, whether the teacher's best
    guess was the best and among the `top` best guesses, Σ min(p, q).
    Notes: the teacher's (c, V) and one head's (c, v) logits are all that is alive. No second derivative.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, teacher: Tensor, weights: Tensor, how: Distillation, chunk: int, wanted: bool,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        total = hidden.new_zeros((), dtype=torch.float32)
        found = hidden.new_zeros(4, *weights.shape, dtype=torch.float32)
        grad_hidden = torch.zeros_like(hidden) if wanted else None
        grads = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        for start in range(0, teacher.shape[0], chunk):
            rows = slice(start, start + chunk)
            if not weights[:, rows].any():
                continue
            p, best, inside = how.truth(teacher[rows])
            for k in range(len(hidden)):
                scale = weights[k, rows] * inside
                with torch.enable_grad():
                    part = hidden[k, rows].detach().requires_grad_(wanted)
                    logits = how.heads[k % len(how.heads)](part)
                log_q = F.log_softmax(logits.detach().float(), dim=-1)
                loss, slopes, acceptance = how.loss(p, log_q)
                total += (scale * loss).sum()
                guesses = log_q.topk(min(how.top, log_q.shape[-1]), dim=-1).indices
                guesses = guesses if how.vocabulary is None else how.vocabulary[guesses]
                right = guesses == best.unsqueeze(-1)
                found[:, k, rows] = torch.stack([loss * inside, right[:, 0].float(), right.any(-1).float(), acceptance])
                if grad_hidden is not None:
                    slopes *= scale.unsqueeze(-1)
                    slope, *others = torch.autograd.grad(
                        logits, [part, *parameters], slopes.to(logits.dtype), allow_unused=True
                    )
                    grad_hidden[k, rows] = slope
                    for grad, other in zip(grads, others, strict=True):
                        if other is not None:
                            grad += other
                del logits, log_q, slopes
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden, *grads)
        ctx.dtypes = [p.dtype for p in parameters]
        ctx.mark_non_differentiable(found)
        return total, found

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, *grads = ctx.saved_tensors
        scaled = [(grad * grad_loss).to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)]
        return (grad_hidden * grad_loss.to(grad_hidden.dtype), None, None, None, None, None, *scaled)


@dataclass(frozen=True)
class Distillation:
    """How drafters learn a teacher's distributions p with their own, q.

        ce = - Σ p log q      kl = Σ p log (p / q)      tv = 1 - α      lk_alpha = - log α      lk_hybrid = w kl + (1 - w) tv
        α = Σ min(p, q), the chance that a token drawn from q is taken        w = exp(- eta α), a constant for the slope

    (LK losses: arXiv 2602.23881.) With a draft `vocabulary` q is over those tokens. Then ce and kl take p over them only, renormalised,
    α takes it as it is, and positions whose best token is not among them do not count (EAGLE-3's reference).
    """

    kind: str
    head: Head  # the teacher's, (n, d) -> (n, V)
    heads: tuple[Head, ...]  # the drafter's: one for each of the K, or one for all; (n, d) -> (n, v)
    vocabulary: Int[Tensor, " v"] | None = None  # target ids, ascending
    eta: float = 3.0
    top: int = 5

    def truth(self, teacher: Float[Tensor, "c d"]) -> tuple[Float[Tensor, "c v"], Int[Tensor, " c"], Float[Tensor, " c"]]:
        """(the teacher's probabilities of the drafter's tokens, its best tokens, 1 where those are among the drafter's)."""
        with torch.no_grad():
            p = self.head(teacher).float().softmax(-1)
            best = p.argmax(-1)
            if self.vocabulary is None:
                return p, best, torch.ones_like(p[:, 0])
            place = torch.searchsorted(self.vocabulary, best).clamp_max(len(self.vocabulary) - 1)
            return p[:, self.vocabulary], best, (self.vocabulary[place] == best).float()

    def loss(self, p: Float[Tensor, "c v"], log_q: Float[Tensor, "c v"]) -> tuple[Tensor, Float[Tensor, "c v"], Tensor]:
        """(loss (c,), its slope at the drafter's logits (c, v), α (c,))."""
        q = log_q.exp()
        acceptance = torch.minimum(p, q).sum(-1)
        # Where the drafter's tokens have no chance at all, the position does not count, and must not be NaN either.
        whole = p if self.vocabulary is None else p / p.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
        if self.kind in ("ce", "kl", "lk_hybrid"):
            ce = -(whole * log_q).sum(-1)
            kl = ce + torch.xlogy(whole, whole).sum(-1)
            if self.kind != "lk_hybrid":
                return (ce if self.kind == "ce" else kl), q - whole, acceptance
        below = (q < p).float()  # where more of q is more of α
        rise = q * (below - (below * q).sum(-1, keepdim=True))
        if self.kind == "tv":
            return 1 - acceptance, -rise, acceptance
        if self.kind == "lk_alpha":
            safe = acceptance.clamp_min(torch.finfo(acceptance.dtype).tiny)
            return -safe.log(), -rise / safe.unsqueeze(-1), acceptance
        w = torch.exp(-self.eta * acceptance)
        return w * kl + (1 - w) * (1 - acceptance), w.unsqueeze(-1) * (q - whole) - (1 - w).unsqueeze(-1) * rise, acceptance


def chunked_distillation(
    hidden: Float[Tensor, "K n d"], teacher: Float[Tensor, "n d"], weights: Float[Tensor, "K n"], how: Distillation, chunk: int,
    parameters: tuple[Tensor, ...] = (),
) -> tuple[Float[Tensor, ""], Float[Tensor, "4 K n"]]:  # fmt: skip
    """(Σ_k Σ_i weights[k, i] loss[k, i], numbers): K drafted distributions, from `hidden`, for each token that the teacher's `hidden`
    states predict; `parameters` are what the drafter's heads train. `numbers` are for each of them its loss, 1 where the drafter's best
    guess is the teacher's, 1 where the teacher's is among the `top` best, and α; zeros where a chunk has no weights."""
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or bool(parameters))
    return _ChunkedDistillation.apply(hidden, teacher.detach(), weights.float(), how, chunk, wanted, *parameters)
