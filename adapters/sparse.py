"""A sparse delta of frozen linear layers, alone or combined with a low-rank one. Its support may
change during training.

    y = (W + S) x + s B A D(x) + b

    W      (o, i), frozen
    S      k values at flat indices row · i + col, zero at the start
    s B A  the low-rank part, if there is one
    D      dropout, on the low-rank branch only

While the delta is attached, a dense weight contains W + S. W's entries at the support are stored
separately, and the sum is written again when the values have changed. So the forward pass is one
dense product, no dense matrix is copied or saved for the backward pass, and W can be restored bit
for bit. On a bf16 base W + S is rounded to bf16, as it is when such weights are served. The values
themselves are fp32 and accumulate updates that rounding hides. A 4- or 8-bit weight is dequantised
before the sum, in the forward pass and again in the backward pass.

If FSDP2 shards the model, a rank holds some rows of W and an equal share of S, whose entries are in
the order of rows. After each step all ranks gather S, layer by layer, and each writes its rows of
W + S. So the forward pass gathers the sum, as it gathers any weight.

Forward    y = x (W + S)ᵀ + s (x̃ Aᵀ) Bᵀ + b          x̃ = D(x)
Backward   dx = dy (W + S) + D'(s (dy B) A)
           dA = s (dy B)ᵀ x̃
           dB = s dyᵀ (x̃ Aᵀ)
           dS_j = Σ_t dy[t, row_j] x[t, col_j]
Shapes     x (t, i), dy (t, o), A (r, i), B (o, r), S and dS (k,)
Confined   with within=nonzero zeros of W stay zero. S has none of them in its support, and the
           low-rank part is M ⊙ s B A with M = (W ≠ 0), so y = x (W + S + M ⊙ s B A)ᵀ + b, without
           D; its gradients take the dense dyᵀ x
Notes      x, or the tensors that recompute it, is saved once for all three parts. x̃ Aᵀ (t, r) is
           saved too, and D's mask if its rate is not 0.

The formulas are those of RoSA (Nikdan et al. 2024, arXiv 2401.04679).

Differs from the paper: the reference code rebuilds W + S in each forward and each backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from adapters import sddmm, shards
from adapters.delta import AdaptedLinear, Delta, saved_for_backward
from adapters.linear import features, float_weight, is_packed, not_a_view

Watcher = Callable[[Tensor, Tensor], None]  # receives dy (t, o) and x (t, i) of a backward pass


class SparseDelta(Delta):
    """The sparse, and possibly low-rank, update of one linear layer. It has no support before
    `set_support`."""

    values: Any  # (k,), the trained entries; None if there are none
    indices: Any  # (k,) int32, sorted row · i + column
    A: Any  # (r, i), and B (o, r), of methods with a low-rank part; else None
    B: Any
    # (k,) the base's entries at the support, or at this rank's part of it, while folded in
    base_values: Any
    crow: Any  # (o + 1,) and col (k,) int32: the support in CSR
    col: Any
    scale = 0.0
    dropout = 0.0
    confined = False  # whether zeros of W stay zero in W + S + s B A (adapter.within=nonzero)

    def __init__(self, linear: Any, k: int, dtype: torch.dtype):
        super().__init__()
        self.i, self.o = features(linear)
        device = linear.weight.device
        self.values = nn.Parameter(torch.zeros(k, device=device, dtype=dtype)) if k else None
        self.register_buffer(
            "indices", torch.zeros(k, device=device, dtype=torch.int32) if k else None
        )
        self.register_parameter("A", None)
        self.register_parameter("B", None)
        for name in ("base_values", "crow", "col"):
            self.register_buffer(name, None, persistent=False)
        self.has_support = False
        self.way = "gathered"  # one of sddmm.WAYS
        self.watch: Watcher | None = None
        # the version of the values that the base's weight contains
        self.folded_version: tuple[int, int] | None = None
        self.sharded = False  # whether it is folded into a shard of the base's weight
        self.packed = is_packed(linear)
        self.transposed = isinstance(linear, Conv1D)

    @property
    def reads_gradients(self) -> bool:
        return self.watch is not None

    def set_support(self, indices: Int[Tensor, " k"], base: Any) -> None:
        """Use sorted flat indices as the support. The values do not change. The delta must not be
        folded in."""
        assert self.base_values is None
        self.indices.copy_(indices)
        self.has_support = True
        self.fold_in(base)

    def fold_in(self, base: Any) -> None:
        if not self.has_support or self.base_values is not None:
            return
        if self.indices.device.type == "meta":
            return
        flat = self.indices.long()
        self.crow = torch.searchsorted(
            flat // self.i, torch.arange(self.o + 1, device=flat.device)
        ).int()
        self.col = (flat % self.i).int()
        if self.packed:
            return
        self.sharded = isinstance(base.weight, DTensor)
        memory = shards.local(base.weight).view(-1)
        self.base_values = memory.index_select(0, self.base_positions(base)[0])
        self.folded_version = None
        self.refresh(base)

    def take_out(self, base: Any) -> None:
        if self.base_values is not None:
            positions, _ = self.base_positions(base)
            shards.local(base.weight).view(-1).index_copy_(0, positions, self.base_values)
            self.base_values = self.folded_version = None

    def refresh(self, base: Any) -> None:
        """Update the base's weight if the values have changed. If they are sharded, all ranks must
        call it together."""
        version = (id(self.values), self.values._version) if self.values is not None else None
        if self.base_values is None or version == self.folded_version:
            return
        positions, entries = self.base_positions(base)
        dtype = self.base_values.dtype
        wide = torch.promote_types(dtype, self.values.dtype)
        total = self.base_values.to(wide) + shards.whole(self.values)[entries]
        shards.local(base.weight).view(-1).index_copy_(0, positions, total.to(dtype))
        self.folded_version = version

    def base_positions(self, base: Any) -> tuple[Tensor, Any]:
        """Return the support as positions in the memory of the base's weight, and the entries of
        the support that they are: all, or those in this rank's shard."""
        flat = self.indices.long()
        positions = flat % self.i * self.o + flat // self.i if self.transposed else flat
        if not self.sharded:
            return positions, slice(None)
        assert isinstance(base.weight, DTensor)  # FSDP2 has not gathered the weight
        start, end = shards.bounds(base.weight)
        entries = ((positions >= start) & (positions < end)).nonzero().squeeze(1)
        return positions[entries] - start, entries

    def linear(self, base: Any, x: Tensor) -> Tensor:
        if self.values is not None and self.has_support and not self.sharded:
            self.refresh(base)
        return _Linear.apply(x, self.values, self.A, self.B, base, self, *saved_for_backward(x))

    def surviving(self, base: Any) -> Bool[Tensor, " oi"] | None:
        """Return which entries of W are not zero, in the order of flat indices; None if all may
        change. W may contain S: the support is always among them."""
        if not self.confined:
            return None
        allowed = float_weight(base).reshape(-1) != 0
        if self.has_support:
            allowed[self.indices.long()] = True
        return allowed

    def confined_low(self, base: Any) -> Float[Tensor, "o i"]:
        """Return M ⊙ s B A, where M is 1 at the entries of W that are not zero."""
        low = self.scale * (self.B.detach() @ self.A.detach())
        allowed: Any = self.surviving(base)
        return low.masked_fill_(~allowed.view(low.shape), 0)

    def dense(self, base: Any, dtype: torch.dtype) -> Float[Tensor, "o i"]:
        """Return W + S in a dtype: the base's weight itself if it has that dtype, else a new
        tensor."""
        if not self.packed:
            weight = base.weight.t() if self.transposed else base.weight
            return weight.to(dtype)
        dense = float_weight(base)
        if self.has_support:
            dense.view(-1).index_add_(0, self.indices, self.values.detach().float())
        return dense.to(dtype)

    def weight(self, w: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        zeros = w == 0 if self.confined else None
        if self.has_support:
            w = w.flatten().index_add(0, self.indices, self.values.to(w.dtype)).view(w.shape)
        if self.A is not None and self.B is not None:
            low = self.scale * (self.B.to(w.dtype) @ self.A.to(w.dtype))
            w = w + (low if zeros is None else low.masked_fill(zeros, 0))
        return w

    def confined_backward(
        self, ctx: Any, dy: Float[Tensor, "t o"], x: Float[Tensor, "t i"], dvalues: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of a confined layer with a low-rank part, in the order of _Linear's
        inputs: dA = Bᵀ D and dB = D Aᵀ with D = s M ⊙ dyᵀ x (o, i)."""
        dx = None
        if ctx.needs_input_grad[0]:
            dense = self.dense(ctx.base, x.dtype) + self.confined_low(ctx.base).to(x.dtype)
            dx = (dy @ dense).view(ctx.shape).to(ctx.dtypes[0])
        allowed: Any = self.surviving(ctx.base)
        full = self.scale * (dy.t() @ x)
        full = full.masked_fill_(~allowed.view(full.shape), 0).to(self.A.dtype)
        dA = self.B.t() @ full if ctx.needs_input_grad[2] else None
        dB = full @ self.A.t() if ctx.needs_input_grad[3] else None
        return dx, dvalues, dA, dB, None, None, None, *(None for _ in ctx.saved_tensors[5:])

    def gradient(self, dy: Float[Tensor, "t o"], x: Float[Tensor, "t i"]) -> Float[Tensor, " k"]:
        """Return the loss's gradient at the support."""
        if self.way == "gathered":
            return sddmm.gathered(dy, x, self.indices)
        # The native code takes no fp16, which autocast may use. With FSDP2 the way is chosen on
        # the CPU, where the model is loaded, and the run may be on GPUs.
        native = self.way == "native" and x.dtype in sddmm.NATIVE and x.device.type == "cpu"
        return (sddmm.native if native else sddmm.sampled)(dy, x, self.crow, self.col)


class _Linear(torch.autograd.Function):
    """The layer with its update as one operation: Forward and Backward of the module's
    docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
        base: Any,
        delta: SparseDelta,
        recompute: Any,
        *sources: Tensor,
    ) -> Tensor:
        dtype = _compute_dtype(x, base)
        with torch.autocast(x.device.type, enabled=False):
            flat = x.to(dtype).reshape(-1, x.shape[-1])
            bias = base.bias.to(dtype) if base.bias is not None else None
            dense = delta.dense(base, dtype)
            low = dropout_mask = None
            if A is not None and delta.confined:
                dense = dense + delta.confined_low(base).to(dtype)
            y = F.linear(flat, dense, bias)
            if A is not None and B is not None and not delta.confined:
                dropped = flat
                if delta.dropout and delta.training:
                    dropout_mask = torch.empty_like(flat, dtype=torch.bool).bernoulli_(
                        1 - delta.dropout
                    )
                    dropped = flat * dropout_mask / (1 - delta.dropout)
                low = dropped @ A.to(dtype).t()
                y.addmm_(low, B.to(dtype).t(), alpha=delta.scale)
        # The weight is saved so that autograd notices if it changes before the backward pass.
        weight = None if delta.packed else base.weight
        ctx.save_for_backward(
            A, B, low, dropout_mask, weight, *(sources if recompute is not None else (flat,))
        )
        ctx.base, ctx.delta, ctx.recompute = base, delta, recompute
        ctx.dtype, ctx.shape = dtype, x.shape
        ctx.dtypes = (x.dtype, values.dtype if values is not None else None)
        return not_a_view(y, (*x.shape[:-1], delta.o))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        A, B, low, dropout_mask, _, *sources = ctx.saved_tensors
        delta: SparseDelta = ctx.delta
        dx = dvalues = dA = dB = None
        with torch.autocast(dy.device.type, enabled=False):
            dy = dy.to(ctx.dtype).reshape(-1, delta.o)
            x = (
                sources[0]
                if ctx.recompute is None
                else ctx.recompute(*sources).to(ctx.dtype).reshape(-1, ctx.shape[-1])
            )
            if delta.watch is not None:
                delta.watch(dy, x)
            if delta.has_support and ctx.needs_input_grad[1]:
                dvalues = delta.gradient(dy, x).to(ctx.dtypes[1])
            # Before there is a support nothing else has a gradient, and 16-mixed looks for
            # infinities in the gradients: 0 * sum passes them on.
            elif A is None:
                dvalues = torch.zeros_like(delta.values) + 0 * dy.float().sum()
            if A is not None and delta.confined:
                return delta.confined_backward(ctx, dy, x, dvalues)
            if ctx.needs_input_grad[0]:
                dx = dy @ delta.dense(ctx.base, x.dtype)
            if A is not None and B is not None:
                dlow = delta.scale * (dy @ B.to(x.dtype))
                if ctx.needs_input_grad[2]:
                    dropped = x if dropout_mask is None else x * dropout_mask / (1 - delta.dropout)
                    dA = (dlow.t() @ dropped).to(A.dtype)
                if ctx.needs_input_grad[3]:
                    dB = (delta.scale * (dy.t() @ low)).to(B.dtype)
                if dx is not None and dropout_mask is None:
                    dx.addmm_(dlow, A.to(x.dtype))
                elif dx is not None:
                    dx += (dlow @ A.to(x.dtype)) * dropout_mask / (1 - delta.dropout)
        dx = dx.view(ctx.shape).to(ctx.dtypes[0]) if dx is not None else None
        return dx, dvalues, dA, dB, None, None, None, *(None for _ in sources)


def _compute_dtype(x: Tensor, base: Any) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return base.weight.dtype if not is_packed(base) else x.dtype


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the adapted layers with a sparse delta, by name."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear) and isinstance(module.delta, SparseDelta):
            yield name, module


def supports(model: nn.Module) -> dict[str, Tensor]:
    """Return the supports of all layers that have one."""
    return {name: layer.delta.indices for name, layer in layers(model) if layer.delta.has_support}


def sparse_values(model: nn.Module) -> list[nn.Parameter]:
    """Return the values of all sparse deltas."""
    return [layer.delta.values for _, layer in layers(model) if layer.delta.values is not None]
