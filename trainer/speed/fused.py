"""Attention, norms and gated activations that read memory fewer times and save less for the
backward pass.

`fuse` puts them in place of transformers' own modules if they compute the same, which it tries on
random numbers. The model's weights and names stay as they are, and so does the saved config. The
numbers are those of the plain modules up to the rounding of the compute dtype.

    attention   on a CPU, by blocks or by torch's flash kernel (trainer.speed.attention)
    RMSNorm     saves its input and one number a row, instead of an fp32 copy
    SwiGLU      saves gate and up, not silu(gate); a LoRA that follows recomputes its input from
                them (adapters.delta.Recompute)

On a CPU norms, SwiGLU, rotary embeddings and the losses can also be computed by elementwise.c, as
`native` says.

For a LoRA step of SmolLM2 in bf16, 4 x 256 tokens, 433 MB are saved for the backward pass instead
of 703. With trainer.speed.malloc and the fused LoRA the step takes 2.6 instead of 3.7 seconds of
one CPU core: `python -m scripts.bench.profile`, and scripts.bench.train with
variants.plain=[fused=false,adapter.fused=false].
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.delta import Recompute
from trainer.speed import attention, elementwise, rotations
from trainer.speed.attention_choice import Choice


def fuse(
    model: nn.Module, choice: Choice | None = None, native: Collection[str] = ()
) -> dict[str, int]:
    """Put the fused modules into `model`, in place, and return how many there are of each kind.
    `choice` says which kernels compute attention; without it blocks do. `native` are the kinds of
    trainer.speed.elementwise that C computes. Call it before an adapter is attached."""
    counts = {"attention": 0, "norms": 0, "gates": 0}
    config: Any = model.config
    if next(model.parameters()).device.type == "cpu" and config._attn_implementation == "sdpa":
        attention.register()
        model.set_attn_implementation(attention.BLOCKED)  # type: ignore[operator]
        for module in model.modules():
            if hasattr(module, "num_key_value_groups"):
                module.attention_choice = choice  # type: ignore[assignment]
                counts["attention"] += 1
    for kind, forward, fits in (
        ("norms", partial(_norm_forward, native="norms" in native), is_norm),
        ("gates", partial(_gated_forward, native="gates" in native), is_gated),
    ):
        tried: dict[tuple[type, Any], bool] = {}
        for module in model.modules():
            if not fits(module):
                continue
            key = (type(module), getattr(module, "variance_epsilon", None))
            if key not in tried:
                tried[key] = same(module, forward)
            if tried[key]:
                module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]
                counts[kind] += 1
    if "rotations" in native:
        counts["rotations"] = rotations.put_in(model)
    if "losses" in native:
        model.native_losses = True  # type: ignore[assignment]
    return counts


def has_native_losses(model: nn.Module) -> bool:
    """Return whether `fuse` has decided that C computes the losses of `model`, which other
    modules may have wrapped since."""
    return any(getattr(module, "native_losses", False) for module in model.modules())


def same(module: Any, forward: Callable[..., Tensor]) -> bool:
    """Return whether `forward` gives what the module gives, on random numbers."""
    weight = module.weight if hasattr(module, "weight") else module.gate_proj.weight
    width = weight.shape[-1]
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0)).to(
        weight.device, weight.dtype
    )
    with torch.no_grad():
        expected, result = module(x), forward(module, x)
    tolerance = 2e-2 if weight.dtype in (torch.bfloat16, torch.float16) else 1e-5
    return result.dtype == expected.dtype and torch.allclose(
        result.float(),
        expected.float(),
        rtol=tolerance,
        atol=tolerance * float(expected.abs().max()),
    )


def is_norm(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__.endswith("RMSNorm")
        and isinstance(getattr(module, "variance_epsilon", None), float)
        and isinstance(weight, nn.Parameter)
        and weight.ndim == 1
        and weight.is_floating_point()
    )


def is_gated(module: Any) -> bool:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    return all(type(part) is nn.Linear for part in parts) and type(
        getattr(module, "act_fn", None)
    ).__name__ in (
        "SiLUActivation",
        "SiLU",
    )


def _norm_forward(self: Any, hidden_states: Tensor, native: bool) -> Tensor:
    return rms_norm(hidden_states, self.weight, self.variance_epsilon, native)


def _gated_forward(self: Any, x: Tensor, native: bool) -> Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    return self.down_proj(swiglu(gate, up, native))


class _RMSNorm(torch.autograd.Function):
    """y = w · round(x / rms(x)), x and y (..., d), w (d,); rms(x) = sqrt(mean x² + eps) in fp32.

    Forward    r = 1 / rms(x)      y = w · (x r)
    Backward   g = w · dy          dx = r (g - x̂ mean(g x̂))      dw = Σ dy x̂      x̂ = x r
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, native: bool) -> Tensor:
        ctx.native = native and elementwise.supports(x, weight)
        if ctx.native:
            y, r = elementwise.norm(x, weight, eps)
            ctx.save_for_backward(x, weight, r.unsqueeze(-1))
            return y
        wide = x.float() if x.dtype != torch.float64 else x
        r = torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, weight, r)
        return weight * (wide * r).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, r = ctx.saved_tensors
        if ctx.native and not ctx.needs_input_grad[1] and elementwise.supports(dy, x):
            return elementwise.norm_back(dy, x, weight, r), None, None, None
        hat = x.to(r.dtype).mul(r)
        dw = (dy * hat).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        dx = None
        if ctx.needs_input_grad[0]:
            g = (dy * weight).to(r.dtype)
            along = torch.linalg.vecdot(g, hat).div_(x.shape[-1]).unsqueeze(-1)
            dx = torch.addcmul(g, hat, along, value=-1).mul_(r).to(x.dtype)
        return dx, dw, None, None


def rms_norm(
    x: Float[Tensor, "*b d"], weight: Float[Tensor, " d"], eps: float, native: bool = False
) -> Float[Tensor, "*b d"]:
    """Compute Llama's RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467). Statistics are in fp32,
    the product with the weight is in the weight's dtype. `native` takes elementwise.c for what it
    supports: all but the gradient of a trained weight."""
    return _RMSNorm.apply(x, weight, eps, native)


class _SwiGLU(torch.autograd.Function):
    """h = silu(gate) · up, all (..., f); silu(gate) is recomputed in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, native: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.native = native
        return _gated(gate, up, native)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        if ctx.native and elementwise.supports(dh, gate, up):
            return *elementwise.gated_back(dh, gate, up), None
        dgate = torch.ops.aten.silu_backward(dh * up, gate)
        return dgate, F.silu(gate).mul_(dh), None


def _gated(gate: Tensor, up: Tensor, native: bool) -> Tensor:
    if native and elementwise.supports(gate, up):
        return elementwise.gated(gate, up)
    return F.silu(gate).mul_(up)


def swiglu(
    gate: Float[Tensor, "*b f"], up: Float[Tensor, "*b f"], native: bool = False
) -> Float[Tensor, "*b f"]:
    """Compute silu(gate) · up (Shazeer 2020, arXiv 2002.05202). The result carries the recipe to
    recompute it, for a module that would otherwise save it for its backward pass. `native` takes
    elementwise.c for what it supports."""
    h = _SwiGLU.apply(gate, up, native)
    if h.requires_grad:
        h.recompute = Recompute(partial(_gated, native=native), (gate.detach(), up.detach()))
    return h
