"""Losses between a target's distributions and a drafter's, holding at most a chunk of either.

    L = Σ_k Σ_i w[k, i] loss(p_i, q_k,i)
    p_i = softmax(head(h_i)), and q_k,i the drafter's distribution of the same token

K drafted distributions are compared with each of the teacher's, which is computed once for all of
them. As in trainer.models.losses, the slopes of a chunk's logits are written out and taken through
the head at once, so no softmax outlives its chunk.

With half-precision products, the work on each logit takes longer than the products, and most of it
is allocating memory. So for ce and kl, whose slope is q - p, `Distillation.quickly` works in two
tensors that are reused for all chunks, and what depends on the teacher alone is computed once for
the K.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from trainer.drafters.layers import autocast_like
from trainer.models.heads import Head
from trainer.models.on_host import sent

KINDS = ("ce", "kl", "tv", "lk_alpha", "lk_hybrid")


class _ChunkedDistillation(torch.autograd.Function):
    """Weighted sum of distillation losses of K predictions for each of n teacher positions, chunk
    by chunk of positions.

    Forward: for each chunk, the teacher's probabilities once; for each of the K the loss and its
    slope at the logits by hand, in fp32; then by autograd through the head the slopes at h_c and at
    the head's parameters. Backward: these, times the incoming scalar.
    Shapes: hidden (K, n, d), teacher (n, d), weights (K, n), or with `shared` hidden (1, m, d) and
    weights (1, m); returns a scalar in fp32 and (4, K, n) or (4, 1, m): loss, whether the teacher's
    best guess was the drafter's best and among its `top` best guesses, Σ min(p, q).
    Notes: never more than a chunk of the teacher's (c, V) and of one head's (c, v) logits exist.
    No second derivative.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        teacher: Tensor,
        weights: Tensor,
        how: Distillation,
        chunk: int,
        needs_grad: bool,
        shared: Shared | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        total = hidden.new_zeros((), dtype=torch.float32)
        numbers = hidden.new_zeros(4, *weights.shape, dtype=torch.float32)
        grad_hidden = torch.zeros_like(hidden) if needs_grad else None
        grads = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        buffers: list[Tensor] = []
        # One context for all heads: fp32 weights that compute in half precision are cast once, not
        # for each head.
        with autocast_like(hidden):
            for start in range(0, teacher.shape[0], chunk):
                logits = how.head(teacher[start : start + chunk])
                with torch.autocast(hidden.device.type, enabled=False):
                    whole = how.truth(logits)
                del logits
                for k, rows, truth in _parts(whole, start, chunk, len(hidden), shared):
                    with torch.enable_grad():
                        part = hidden[k, rows].detach().requires_grad_(needs_grad)
                        logits = how.heads[k % len(how.heads)](part)
                    scale = weights[k, rows] * truth.inside
                    with torch.autocast(hidden.device.type, enabled=False):
                        loss, slopes, counts = _compared(how, truth, logits.detach(), buffers)
                        total += (scale * loss).sum()
                        numbers[:, k, rows] = counts
                        if grad_hidden is not None:
                            slopes *= scale.unsqueeze(-1)
                            slope, *others = torch.autograd.grad(
                                logits,
                                [part, *parameters],
                                slopes.to(logits.dtype),
                                allow_unused=True,
                            )
                            grad_hidden[k, rows] = slope
                            for grad, other in zip(grads, others, strict=True):
                                if other is not None:
                                    grad += other
                    del logits, slopes
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden, *grads)
        ctx.dtypes = [p.dtype for p in parameters]
        ctx.mark_non_differentiable(numbers)
        return total, numbers

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_loss: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad_hidden, *grads = ctx.saved_tensors
        scaled = [
            (grad * grad_loss).to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        ]
        return (
            grad_hidden * grad_loss.to(grad_hidden.dtype),
            None,
            None,
            None,
            None,
            None,
            None,
            *scaled,
        )


def _parts(
    truth: Truth, start: int, chunk: int, heads: int, shared: Shared | None
) -> Iterator[tuple[int, slice, Truth]]:
    """Yield which of the predictions (k, rows) have a chunk of teacher positions, with its
    distributions. Never more than `chunk` rows."""
    if shared is None:
        for k in range(heads):
            yield k, slice(start, start + chunk), truth
        return
    first, end = shared.before[start], shared.before[start + len(truth.best)]
    for at in range(first, end, chunk):
        rows = slice(at, min(at + chunk, end))
        yield 0, rows, truth.rows(shared.teacher[rows] - start)


def _compared(
    how: Distillation, truth: Truth, logits: Float[Tensor, "c v"], buffers: list[Tensor]
) -> tuple[Tensor, Float[Tensor, "c v"], Float[Tensor, "4 c"]]:
    """Return (loss, slopes at the logits, numbers) of a chunk. The loss in `numbers` is that of the
    kind alone."""
    if how.quick:
        loss, slopes, acceptance, guesses = how.quickly(truth, logits, buffers)
        whole = loss
    else:
        log_q = F.log_softmax(logits.float(), dim=-1)
        loss, slopes, acceptance = how.loss(truth.p, log_q)
        guesses = log_q.topk(min(how.top, log_q.shape[-1]), dim=-1).indices
        whole = loss
        if how.topk is not None:
            more, slope = how.likely(truth, log_q)
            whole, slopes = loss + how.topk_weight * more, slopes + how.topk_weight * slope
        del log_q
    guesses = guesses if how.vocabulary is None else how.vocabulary[guesses]
    right = guesses == truth.best.unsqueeze(-1)
    numbers = [loss * truth.inside, right[:, 0].float(), right.any(-1).float(), acceptance]
    return whole, slopes, torch.stack(numbers)


@dataclass(frozen=True)
class Shared:
    """The teacher position of each of m predictions, where several have the same one. Predictions
    are in the order of their teachers."""

    teacher: Int[Tensor, " m"]  # ascending, on the device
    before: list[int]  # the predictions before each of the n teacher positions, and m; on the host

    @classmethod
    def by_place(
        cls, places: Int[Tensor, " m"], device: torch.device
    ) -> tuple[Self, Int[Tensor, " m"], Int[Tensor, " n"]]:
        """Return (self, the order of the predictions, the different places) of the places that m
        predictions are compared at. All but `teacher` are on the host, as `places` are."""
        order = places.argsort(stable=True)
        different, teacher, counts = places[order].unique_consecutive(
            return_inverse=True, return_counts=True
        )
        before = [0, *counts.cumsum(0).tolist()]
        return cls(sent(teacher, device), before), order, different


@dataclass(frozen=True)
class Truth:
    """A teacher's distributions at c positions."""

    p: Float[Tensor, "c v"]  # the probabilities of the drafter's tokens
    whole: Float[Tensor, "c v"]  # the same, renormalised
    best: Int[Tensor, " c"]  # the most likely tokens
    inside: Float[Tensor, " c"]  # 1 if that is one of the drafter's tokens, else 0

    @cached_property
    def entropy(self) -> Float[Tensor, " c"]:
        """Σ p log p of the renormalised probabilities."""
        return torch.xlogy(self.whole, self.whole).sum(-1)

    def rows(self, index: Int[Tensor, " r"]) -> Truth:
        """Return the distributions at these of the positions."""
        p = self.p[index]
        whole = p if self.whole is self.p else self.whole[index]
        return Truth(p, whole, self.best[index], self.inside[index])


@dataclass(frozen=True)
class Distillation:
    """The way drafters learn a teacher's distributions p with their own, q.

        ce = - Σ p log q        kl = Σ p log (p / q)        tv = 1 - α
        lk_alpha = - log α      lk_hybrid = w kl + (1 - w) tv
        ce_l1 = ce · ce + l1 · Σ |q - p|, of block drafters only
        α = Σ min(p, q), the probability that a token drawn from q is accepted
        w = exp(- eta α), a constant for the slope

    (LK losses: arXiv 2602.23881.) With a draft `vocabulary` q covers those tokens only. Then ce and
    kl use p over them, renormalised, α uses p as it is, and positions whose best token is not among
    them do not count (as in EAGLE-3's reference).

    With `topk`, HASS's loss (arXiv 2408.15766, section 3.2) is added, topk_weight times

        - Σ_{x in K} p(x) log q(x), K the `topk` most likely tokens of p, which is not renormalised

    with the slope q Σ_K p - p at K, q Σ_K p elsewhere. It is not least at q = p: it sharpens q.
    """

    kind: str
    head: Head  # the teacher's, (n, d) -> (n, V)
    # the drafter's, (n, d) -> (n, v): one for each of the K, or one for all
    heads: tuple[Head, ...]
    vocabulary: Int[Tensor, " v"] | None = None  # target ids, ascending
    eta: float = 3.0
    top: int = 5
    fast: bool = True  # whether ce and kl may use `quickly` instead of `loss`
    topk: int | None = None
    topk_weight: float = 1.0
    ce: float = 0.1  # of ce_l1
    l1: float = 0.9

    @property
    def quick(self) -> bool:
        """Return whether `quickly` is used."""
        return self.fast and self.kind in ("ce", "kl") and self.topk is None

    @torch.no_grad()
    def truth(self, logits: Float[Tensor, "c V"]) -> Truth:
        """Return the teacher's distributions over the drafter's tokens."""
        p = logits.float().softmax(-1)
        best = p.argmax(-1)
        if self.vocabulary is None:
            return Truth(p, p, best, torch.ones_like(p[:, 0]))
        index = torch.searchsorted(self.vocabulary, best).clamp_max(len(self.vocabulary) - 1)
        p = p.index_select(1, self.vocabulary)
        return Truth(p, _renormalised(p), best, (self.vocabulary[index] == best).float())

    def quickly(
        self, truth: Truth, logits: Float[Tensor, "c v"], buffers: list[Tensor]
    ) -> tuple[Tensor, Float[Tensor, "c v"], Tensor, Int[Tensor, "c top"]]:
        """Return (loss, its slope, α, best guesses) of ce or kl, equal to `loss` up to rounding.
        `buffers` is an empty list at first. The slopes are valid until the next call with it.

            log q = x - max x - log Σ exp(x - max x)
        """
        if not buffers or len(buffers[0]) < len(logits):
            buffers[:] = [torch.empty_like(truth.p), torch.empty_like(truth.p)]
        q, spare = (tensor[: len(logits)] for tensor in buffers)
        highest, guesses = q.copy_(logits).topk(min(self.top, q.shape[-1]), dim=-1)
        q -= highest[:, :1]
        ce = -torch.mul(truth.whole, q, out=spare).sum(-1)
        total = q.exp_().sum(-1, keepdim=True)
        ce += total[:, 0].log()
        q /= total
        acceptance = torch.minimum(truth.p, q, out=spare).sum(-1)
        q -= truth.whole
        return (ce if self.kind == "ce" else ce + truth.entropy), q, acceptance, guesses

    def likely(
        self, truth: Truth, log_q: Float[Tensor, "c v"]
    ) -> tuple[Tensor, Float[Tensor, "c v"]]:
        """Return (HASS's top-k loss (c,), its slope at the drafter's logits (c, v))."""
        assert self.topk is not None
        p, places = truth.whole.topk(min(self.topk, log_q.shape[-1]), dim=-1)
        loss = -(p * log_q.gather(-1, places)).sum(-1)
        slope = log_q.exp() * p.sum(-1, keepdim=True)
        return loss, slope.scatter_add(-1, places, -p)

    def loss(
        self, p: Float[Tensor, "c v"], log_q: Float[Tensor, "c v"]
    ) -> tuple[Tensor, Float[Tensor, "c v"], Tensor]:
        """Return (loss (c,), its slope at the drafter's logits (c, v), α (c,))."""
        q = log_q.exp()
        acceptance = torch.minimum(p, q).sum(-1)
        whole = p if self.vocabulary is None else _renormalised(p)
        if self.kind in ("ce", "kl", "lk_hybrid", "ce_l1"):
            ce = -(whole * log_q).sum(-1)
            kl = ce + torch.xlogy(whole, whole).sum(-1)
            if self.kind in ("ce", "kl"):
                return (ce if self.kind == "ce" else kl), q - whole, acceptance
        below = (q < p).float()  # where raising q raises α
        rise = q * (below - (below * q).sum(-1, keepdim=True))
        if self.kind == "ce_l1":  # Σ |q - p| = 2 (1 - α)
            return (
                self.ce * ce + 2 * self.l1 * (1 - acceptance),
                self.ce * (q - whole) - 2 * self.l1 * rise,
                acceptance,
            )
        if self.kind == "tv":
            return 1 - acceptance, -rise, acceptance
        if self.kind == "lk_alpha":
            safe = acceptance.clamp_min(torch.finfo(acceptance.dtype).tiny)
            return -safe.log(), -rise / safe.unsqueeze(-1), acceptance
        w = torch.exp(-self.eta * acceptance)
        return (
            w * kl + (1 - w) * (1 - acceptance),
            w.unsqueeze(-1) * (q - whole) - (1 - w).unsqueeze(-1) * rise,
            acceptance,
        )


def _renormalised(p: Tensor) -> Tensor:
    """Return p / Σ p. A position where the drafter's tokens have probability 0 does not count, and
    must not become NaN."""
    return p / p.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)


def chunked_distillation(
    hidden: Float[Tensor, "K n d"],
    teacher: Float[Tensor, "n d"],
    weights: Float[Tensor, "K n"],
    how: Distillation,
    chunk: int,
    parameters: tuple[Tensor, ...] = (),
    shared: Shared | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "4 K n"]]:
    """Return (Σ_k Σ_i weights[k, i] loss[k, i], numbers) of K drafted distributions, computed from
    `hidden`, for each token that the teacher's hidden states predict.

    With `shared` there is one prediction of each of m tokens, hidden (1, m, d) and weights (1, m),
    whose teachers are those of `shared`: a teacher's distribution is computed once for all of them.
    `parameters` are the trained parameters of the drafter's heads. `numbers` are, for each
    position, the loss, 1 if the drafter's best guess is the teacher's, 1 if the teacher's is among
    the `top` best, and α.
    """
    parameters = tuple(p for p in parameters if p.requires_grad)
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or bool(parameters))
    return _ChunkedDistillation.apply(
        hidden, teacher.detach(), weights.float(), how, chunk, needs_grad, shared, *parameters
    )
