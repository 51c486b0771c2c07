"""PST: a sparse base whose mask and weights are learnt by low-rank factors (Li et al. 2022, arXiv
2205.11005, and its code).

    y  = W' x                  W' = M ⊙ Z
    Z  = W + U V               the updated weight
    S  = |Z| + A B + R 1ᵀ + 1 Cᵀ           scores; M keeps the largest of them
    dZ = M ⊙ dW' + sign(Z) ⊙ dS            dS = dW' ⊙ Z           straight through M

    W (o, i) frozen; U, A (o, r); V, B (r, i); R (o,); C (i,). U and A have variance 1 / r at the
    start, the others are zero, so y starts as W x while nothing is pruned.

With pattern=unstructured the share v of entries that are zero rises over the run,

    v(t) = 0 before t0        v1 - v1 (1 - τ)³, τ = (t - t0) / (t1 - t0)        v1 from t1 on

and M keeps all but int(v o i) entries. With pattern=2:4 it keeps two of every four inputs from t0
on. M is chosen again every `renew` steps; it is part of a checkpoint. After t1 M has its last
density, so the merged folder has exactly that many zeros, or the pattern.

Differs from the paper's code: its U and A have variance 1, which makes the first steps huge; it
sorts in each forward pass; its factors β, a1 and a2 are 1 here, as in its settings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from adapters import two_of_four
from adapters.delta import Adapter, AdapterError, Delta, Start
from adapters.linear import features, float_weight, not_a_view
from adapters.targets import targets


class PST(Delta):
    """The update and the mask of one linear layer."""

    mask: Tensor

    def __init__(self, linear: Any, rank: int, dtype: torch.dtype):
        super().__init__()
        i, o = features(linear)
        place = {"device": linear.weight.device, "dtype": dtype}
        self.U, self.A = (
            nn.Parameter(torch.randn(o, rank, **place) / math.sqrt(rank)) for _ in range(2)
        )
        self.V, self.B = (nn.Parameter(torch.zeros(rank, i, **place)) for _ in range(2))
        self.R = nn.Parameter(torch.zeros(o, **place))
        self.C = nn.Parameter(torch.zeros(i, **place))
        everything = torch.ones(o, i, dtype=torch.bool, device=linear.weight.device)
        self.register_buffer("mask", everything)

    def linear(self, base: Any, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        factors = (self.U, self.V, self.A, self.B, self.R, self.C)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            y = _Pruned.apply(x, base.weight, self.mask, dtype, *factors)
        return y if base.bias is None else y + base.bias.to(y.dtype)

    def forward(self, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        raise NotImplementedError("PST replaces the frozen product: call `linear`")

    def weight(self, w: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        return self.mask * updated(w, self.U, self.V)

    @torch.no_grad()
    def scores(self, w: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        """Return S for the frozen weight."""
        rest = self.A @ self.B + self.R.unsqueeze(1) + self.C
        return updated(w, self.U, self.V).abs() + rest.to(w.dtype)

    @torch.no_grad()
    def choose(self, w: Float[Tensor, "o i"], zeros: int | None) -> None:
        """Choose M again: all but `zeros` entries, or the pattern 2:4 if that is None."""
        scores = self.scores(w)
        if zeros is None:
            self.mask.copy_(two_of_four.keep(scores))
            return
        self.mask.fill_(True)
        if zeros:
            places = scores.flatten().topk(zeros, largest=False, sorted=False).indices
            self.mask.view(-1)[places] = False


def updated(w: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """Return Z in the dtype of the frozen weight."""
    return w + (U @ V).to(w.dtype)


class _Pruned(torch.autograd.Function):
    """x W'ᵀ, with the gradients of the module's docstring.

    Shapes     x (*b, i), W and M (o, i), factors as there
    Dtypes     products in `dtype`, Z in W's; a factor's gradient in its own
    Notes      x, W and M are saved, and nothing else of W's size: Z is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, M: Tensor, dtype: torch.dtype, *factors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, W, M, *factors)
        ctx.dtype = dtype
        pruned = (M * updated(W, factors[0], factors[1])).to(dtype)
        y = F.linear(x.to(dtype).reshape(-1, x.shape[-1]), pruned)
        return not_a_view(y, (*x.shape[:-1], len(W)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, W, M, *factors = ctx.saved_tensors
        U, V, A, B, *_ = factors
        with torch.autocast(dy.device.type, enabled=False):
            Z, dy = updated(W, U, V), dy.to(ctx.dtype).reshape(-1, dy.shape[-1])
            dx = None
            if ctx.needs_input_grad[0]:
                dx = (dy @ (M * Z).to(ctx.dtype)).view(x.shape).to(x.dtype)
            dW = (dy.t() @ x.to(ctx.dtype).reshape(-1, x.shape[-1])).to(U.dtype)
            dS = dW * Z.to(U.dtype)
            dZ = M * dW + Z.sign().to(U.dtype) * dS
            grads = (dZ @ V.t(), U.t() @ dZ, dS @ B.t(), A.t() @ dS, dS.sum(1), dS.sum(0))
        return dx, None, None, None, *grads


class PSTAdapter(Adapter):
    """PST on the linear layers of a model. `warmup` and `final` are the shares of the run before
    and after the density changes."""

    exportable = False

    def __init__(
        self,
        rank: int,
        pattern: str,
        sparsity: float,
        warmup: float,
        final: float,
        renew: int,
        target_modules: str | list[str],
        exclude_modules: Sequence[str],
        dtype: str,
    ):
        self.rank, self.pattern, self.sparsity = rank, pattern, sparsity
        self.warmup, self.final, self.renew = warmup, final, renew
        self.target_modules, self.exclude_modules = target_modules, list(exclude_modules)
        self.dtype, self.steps = getattr(torch, dtype), 1

    def make(self, linear: nn.Module) -> PST:
        return PST(linear, self.rank, self.dtype)

    def attach(self, model: nn.Module, start: Start) -> nn.Module:
        if self.warmup + self.final > 1:
            raise AdapterError(
                f"adapter.warmup={self.warmup:g} and adapter.final={self.final:g} are shares of"
                " the run, expected at most 1 together: lower one of them"
            )
        self.steps = start.steps
        refuse = two_of_four.refuse_unfit if self.pattern == "2:4" else two_of_four.refuse_other
        for name, linear in targets(
            model, self.target_modules, self.exclude_modules, start.new_modules
        ):
            refuse(name, linear, "pst")
        return super().attach(model, start)

    def share(self, step: int) -> float:
        """Return v after a number of steps: the share of entries that are zero."""
        first, last = self.warmup * self.steps, (1 - self.final) * self.steps
        if step >= last:
            return self.sparsity
        if step < first or self.pattern == "2:4":
            return self.sparsity if self.pattern == "2:4" and step >= first else 0.0
        return self.sparsity * (1 - (1 - (step - first) / (last - first)) ** 3)

    def after_step(self, model: nn.Module, step: int) -> dict[str, float] | None:
        share = self.share(step)
        if share and (step % self.renew == 0 or step >= self.steps):
            for module in model.modules():
                delta = getattr(module, "delta", None)
                if isinstance(delta, PST):
                    weight: Any = float_weight(module.base)
                    count = None if self.pattern == "2:4" else int(share * weight.numel())
                    delta.choose(weight, count)
        return {"zeros": share}

    def save(self, model: nn.Module, folder: Any, base_name: str, task_type: str) -> None:
        raise AdapterError(
            "adapter=pst prunes the base's own weights, which no adapter of PEFT can. Export it"
            " with to=merged"
        )
