"""A low-rank update over a quantised layer of bitsandbytes, as one operation (QLoRA, Dettmers et
al. 2023, arXiv 2305.14314).

    Forward    y = base(x) + s (x Aᵀ) Bᵀ                     base: its own kernel
    Backward   l = s dy B        dx = dy Ŵ + l A        dA = lᵀ x        dB = s dyᵀ (x Aᵀ)

    Ŵ (o, i)   the dequantised weight, in the compute dtype, as bitsandbytes' backward pass has it

Both sums are made in place, where two operations of autograd have a copy of y and one of dx. x is
saved, or the tensors that recompute it. bitsandbytes' 8-bit product would save another x, which is
dropped here. On a CPU the dequantisation takes most of the time: one operation takes 0.93 to 1.00
of that of two (AMX, one core, bf16, 1024 tokens, `python -m scripts.bench.quantised_lora`).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from adapters.linear import not_a_view

KINDS = ("Linear4bit", "Linear8bitLt")  # bitsandbytes' layers


def supports(base: Any) -> bool:
    """Return whether a layer is a frozen quantised one of bitsandbytes."""
    return (
        type(base).__name__ in KINDS
        and type(base).__module__.startswith("bitsandbytes.")
        and not base.weight.requires_grad
        and (base.bias is None or not base.bias.requires_grad)
        and not (type(base).__name__ == KINDS[1] and base.state.has_fp16_weights)
    )


def dequantised(base: Any, dtype: torch.dtype) -> Float[Tensor, "o i"]:
    """Return Ŵ. An 8-bit layer has it after its first forward pass."""
    if type(base).__name__ == KINDS[1]:
        state = base.state
        return state.CB.to(dtype, copy=True).mul_(state.SCB.unsqueeze(1).mul(1.0 / 127.0))
    import bitsandbytes.functional as bnb

    return bnb.dequantize_4bit(base.weight.data, base.weight.quant_state).to(dtype)


class OverQuantised(torch.autograd.Function):
    """Forward and Backward of the module's docstring.

    Shapes     x (*b, i), A (r, i), B (o, r)
    Dtypes     products in that of base(x); dA and dB in A's and B's
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        base: Any,
        scale: float,
        recompute: Any,
        *sources: Tensor,
    ) -> Tensor:
        y = base(x)
        dtype, shape = y.dtype, y.shape
        y = y.reshape(-1, shape[-1])
        flat = x.to(dtype).reshape(-1, x.shape[-1])
        low = F.linear(flat, A.to(dtype))
        y.addmm_(low, B.to(dtype).t(), alpha=scale)
        ctx.save_for_backward(A, B, low, *(sources if recompute is not None else (flat,)))
        ctx.base, ctx.scale, ctx.dtype, ctx.recompute = base, scale, dtype, recompute
        ctx.shape, ctx.input_dtype = x.shape, x.dtype
        return not_a_view(y, shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        A, B, low, *sources = ctx.saved_tensors
        dtype: torch.dtype = ctx.dtype
        dx = dA = dB = None
        dy = dy.to(dtype).reshape(-1, dy.shape[-1])
        dlow = (dy @ B.to(dtype)).mul_(ctx.scale)
        if ctx.needs_input_grad[0]:
            dx = (dy @ dequantised(ctx.base, dtype)).addmm_(dlow, A.to(dtype))
            dx = dx.view(ctx.shape).to(ctx.input_dtype)
        if ctx.needs_input_grad[1]:
            flat = (
                sources[0]
                if ctx.recompute is None
                else ctx.recompute(*sources).to(dtype).reshape(-1, ctx.shape[-1])
            )
            dA = (dlow.t() @ flat).to(A.dtype)
        if ctx.needs_input_grad[2]:
            dB = (dy.t() @ low).mul_(ctx.scale).to(B.dtype)
        return dx, dA, dB, None, None, None, *(None for _ in sources)
