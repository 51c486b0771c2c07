"""Attention, norms and gated activations that read memory fewer times and save less for the
backward pass.

`fuse` puts them in place of transformers' own modules if they compute the same, which it tries on
random numbers. The model's weights and names stay as they are, and so does the saved config. The
numbers are those of the plain modules up to the rounding of the compute dtype.

    attention   on a CPU, where sdpa's backward pass was 18 % of a LoRA step in bf16: blocks of
                queries against the keys that any of them sees, as batched products; scores and
                softmax in fp32
    RMSNorm     saves its input and one number a row, instead of an fp32 copy
    SwiGLU      saves gate and up, not silu(gate); a LoRA that follows recomputes its input from
                them (adapters.delta.Recompute)

For a LoRA step of SmolLM2 in bf16, 4 x 256 tokens, 433 MB are saved for the backward pass instead
of 703. With trainer.speed.malloc and the fused LoRA the step takes 2.6 instead of 3.7 seconds of
one CPU core: `python -m scripts.bench.profile`, and scripts.bench.train with
variants.plain=[fused=false,adapter.fused=false].
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adapters.delta import Recompute

BLOCKED = "blocked"  # the attention's name in transformers
# Queries whose scores exist at one time: few enough that the scores stay in a core's cache.
BLOCK = 64
UNSUPPORTED = ("position_bias", "cache", "softcap", "s_aux")  # options of transformers' attention
# For each block of queries: (first query, last query + 1, first key, last key + 1, mask). The keys
# are those that some query of the block sees; the mask is added to the scores.
BlockPlan = list[tuple[int, int, int, int, Tensor | None]]


def fuse(model: nn.Module) -> dict[str, int]:
    """Put the fused modules into `model`, in place, and return how many there are of each kind.
    Call it before an adapter is attached."""
    counts = {"attention": 0, "norms": 0, "gates": 0}
    config: Any = model.config
    if next(model.parameters()).device.type == "cpu" and config._attn_implementation == "sdpa":
        register()
        model.set_attn_implementation(BLOCKED)  # type: ignore[operator]
        counts["attention"] = sum(
            hasattr(module, "num_key_value_groups") for module in model.modules()
        )
    for kind, forward, fits in (
        ("norms", _norm_forward, _is_norm),
        ("gates", _gated_forward, _is_gated),
    ):
        tried: dict[tuple[type, Any], bool] = {}
        for module in model.modules():
            if not fits(module):
                continue
            key = (type(module), getattr(module, "variance_epsilon", None))
            if key not in tried:
                tried[key] = _same(module, forward)
            if tried[key]:
                module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]
                counts[kind] += 1
    return counts


def register() -> None:
    """Make attention by blocks known to transformers, under the name BLOCKED."""
    if BLOCKED not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(BLOCKED, blocked_attention_forward)
        ALL_MASK_ATTENTION_FUNCTIONS.register(BLOCKED, sdpa_mask)


def _same(module: Any, forward: Callable[..., Tensor]) -> bool:
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


def _is_norm(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__.endswith("RMSNorm")
        and isinstance(getattr(module, "variance_epsilon", None), float)
        and isinstance(weight, nn.Parameter)
        and weight.ndim == 1
        and weight.is_floating_point()
    )


def _is_gated(module: Any) -> bool:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    return all(type(part) is nn.Linear for part in parts) and type(
        getattr(module, "act_fn", None)
    ).__name__ in (
        "SiLUActivation",
        "SiLU",
    )


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _gated_forward(self: Any, x: Tensor) -> Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    return self.down_proj(swiglu(gate, up))


class _RMSNorm(torch.autograd.Function):
    """y = w · round(x / rms(x)), x and y (..., d), w (d,); rms(x) = sqrt(mean x² + eps) in fp32.

    Forward    r = 1 / rms(x)      y = w · (x r)
    Backward   g = w · dy          dx = r (g - x̂ mean(g x̂))      dw = Σ dy x̂      x̂ = x r
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        r = torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, weight, r)
        return weight * (wide * r).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, r = ctx.saved_tensors
        hat = x.to(r.dtype).mul(r)
        dw = (dy * hat).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        dx = None
        if ctx.needs_input_grad[0]:
            g = (dy * weight).to(r.dtype)
            along = torch.linalg.vecdot(g, hat).div_(x.shape[-1]).unsqueeze(-1)
            dx = torch.addcmul(g, hat, along, value=-1).mul_(r).to(x.dtype)
        return dx, dw, None


def rms_norm(
    x: Float[Tensor, "*b d"], weight: Float[Tensor, " d"], eps: float
) -> Float[Tensor, "*b d"]:
    """Compute Llama's RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467). Statistics are in fp32,
    the product with the weight is in the weight's dtype."""
    return _RMSNorm.apply(x, weight, eps)


class _SwiGLU(torch.autograd.Function):
    """h = silu(gate) · up, all (..., f); silu(gate) is recomputed in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        dgate = torch.ops.aten.silu_backward(dh * up, gate)
        return dgate, F.silu(gate).mul_(dh)


def swiglu(gate: Float[Tensor, "*b f"], up: Float[Tensor, "*b f"]) -> Float[Tensor, "*b f"]:
    """Compute silu(gate) · up (Shazeer 2020, arXiv 2002.05202). The result carries the recipe to
    recompute it, for a module that would otherwise save it for its backward pass."""
    h = _SwiGLU.apply(gate, up)
    if h.requires_grad:
        h.recompute = Recompute(
            lambda gate, up: F.silu(gate).mul_(up), (gate.detach(), up.detach())
        )
    return h


class _Blocked(torch.autograd.Function):
    """Softmax attention, one block of queries at a time. Grouped query heads share a key without a
    copy of it.

    Forward    S = s q kᵀ + mask      P = softmax(S)      o = P v
    Backward   S and P again          dv = Pᵀ do          dP = do vᵀ
               dS = P (dP - Σ_keys P dP)                  dq = s dS k         dk = s dSᵀ q
    Shapes     q (B, H, T, d), k (B, K, T, d), v (B, K, T, e), H = K G; o (B, T, H, e)
    Dtypes     S and P in fp32 (float64 for float64); P, dP and dS rounded to q's dtype for the
               products
    Notes      nothing of size T x T is saved, and a block multiplies only the keys that its plan
               names. The backward pass is FlashAttention's (Dao et al. 2022, arXiv 2205.14135,
               algorithm 4), by blocks of queries alone.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, plans: list[BlockPlan]
    ) -> Tensor:
        (B, H, T, d), K, e = q.shape, k.shape[1], v.shape[-1]
        out = q.new_empty(B, T, K, H // K, e)
        for rows, plan in _rows_by_plan(plans, B):
            keys, values, queries = (
                _heads(k[rows]),
                _heads(v[rows]),
                q[rows].reshape(-1, K, H // K, T, d),
            )
            wide = keys.to(_wide(q))
            for a, b, low, high, mask in plan:
                P = _probabilities(queries, wide, scale, a, b, low, high, mask).to(q.dtype)
                part = torch.bmm(P, values[:, low:high])
                out[rows, a:b] = part.view(-1, K, H // K, b - a, e).permute(0, 3, 1, 2, 4)
        ctx.save_for_backward(q, k, v)
        ctx.scale, ctx.plans = scale, plans
        return out.view(B, T, H, e)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        scale: float = ctx.scale
        (B, H, T, d), K, e = q.shape, k.shape[1], v.shape[-1]
        G = H // K
        dq = q.new_empty(B, K, G, T, d)
        # dk and dv are sums over the blocks, so they are wide.
        dk, dv = q.new_zeros(B, K, T, d, dtype=_wide(q)), q.new_zeros(B, K, T, e, dtype=_wide(q))
        dout = dout.to(q.dtype).reshape(B, T, K, G, e)
        with torch.autocast(q.device.type, enabled=False):
            for rows, plan in _rows_by_plan(ctx.plans, B):
                keys, values, queries = (
                    _heads(k[rows]),
                    _heads(v[rows]),
                    q[rows].reshape(-1, K, G, T, d),
                )
                wide, transposed = keys.to(_wide(q)), values.transpose(1, 2)
                dkeys, dvalues = dk[rows].view(-1, T, d), dv[rows].view(-1, T, e)
                for a, b, low, high, mask in plan:
                    P = _probabilities(queries, wide, scale, a, b, low, high, mask).to(q.dtype)
                    do = dout[rows, a:b].permute(0, 2, 3, 1, 4).reshape(-1, G * (b - a), e)
                    dvalues[:, low:high] += torch.bmm(P.transpose(1, 2), do)
                    dP = torch.bmm(do, transposed[:, :, low:high])
                    dS = torch._softmax_backward_data(dP, P, -1, P.dtype)
                    dq[rows, :, :, a:b] = torch.bmm(dS, keys[:, low:high]).view(-1, K, G, b - a, d)
                    dkeys[:, low:high] += torch.bmm(
                        dS.transpose(1, 2), queries[:, :, :, a:b].reshape(-1, G * (b - a), d)
                    )
        dq.mul_(scale)
        return dq.view(B, H, T, d), dk.mul_(scale).to(k.dtype), dv.to(v.dtype), None, None


def _wide(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _heads(x: Tensor) -> Tensor:
    """Return (B, K, T, d) as B K matrices."""
    return x.reshape(-1, *x.shape[2:])


def _probabilities(
    queries: Tensor,
    keys: Tensor,
    scale: float,
    a: int,
    b: int,
    low: int,
    high: int,
    mask: Tensor | None,
) -> Float[Tensor, "BK Gt s"]:
    """Return P of queries a to b over keys low to high, in the dtype of the keys."""
    B, K, G, _, d = queries.shape
    block = queries[:, :, :, a:b].reshape(B * K, G * (b - a), d).to(keys.dtype) * scale
    S = torch.bmm(block, keys[:, low:high].transpose(1, 2))
    if mask is not None:
        seen = S.view(B, K * G, b - a, high - low)[..., -mask.shape[-1] :]
        seen += mask
    return torch.softmax(S, dim=-1)


def _rows_by_plan(plans: list[BlockPlan], B: int) -> list[tuple[slice, BlockPlan]]:
    """Return the rows of a batch with their plan: one plan for all rows, or one for each."""
    return (
        [(slice(0, B), plans[0])]
        if len(plans) == 1
        else [(slice(i, i + 1), plan) for i, plan in enumerate(plans)]
    )


def causal_plan(T: int, dtype: torch.dtype, device: torch.device, block: int = BLOCK) -> BlockPlan:
    """Return the plan for queries that see themselves and what is before them: a triangle is
    masked at the end of each block."""
    triangle = torch.full((block, block), float("-inf"), dtype=dtype, device=device).triu(1)
    return [
        (a, min(a + block, T), 0, min(a + block, T), triangle[: T - a, : T - a])
        for a in range(0, T, block)
    ]


def plans_of_mask(mask: Tensor, dtype: torch.dtype, block: int = BLOCK) -> list[BlockPlan] | None:
    """Return a plan for each row of a mask (B | 1, 1 | H, T, T), which is True or 0 where a query
    sees a key. Return None if heads have masks of their own, or a query sees nothing."""
    if mask.shape[1] != 1:
        return None
    added = (
        mask
        if mask.is_floating_point()
        else torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
            ~mask, float("-inf")
        )
    )
    added = added[:, 0].to(dtype)
    seen = added > torch.finfo(added.dtype).min / 2
    if not bool(seen.any(-1).all()):
        return None
    T, plans = mask.shape[-1], []
    for row, added_row in zip(seen, added, strict=True):
        plan: BlockPlan = []
        for a in range(0, T, block):
            b = min(a + block, T)
            where = row[a:b].any(0).nonzero()
            low, high = int(where[0]), int(where[-1]) + 1
            part = added_row[a:b, low:high]
            plan.append((a, b, low, high, None if not bool(part.any()) else part.contiguous()))
        plans.append(plan)
    return plans


def attention(
    q: Float[Tensor, "B H T d"],
    k: Float[Tensor, "B K T d"],
    v: Float[Tensor, "B K T e"],
    scale: float,
    plans: list[BlockPlan],
) -> Float[Tensor, "B T H e"]:
    """Compute attention by blocks. `plans` holds one plan for all rows, or one for each."""
    return _Blocked.apply(q, k, v, scale, plans)


def blocked_attention_forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Compute what transformers calls attention "blocked": by blocks where this file supports the
    case, by transformers' sdpa otherwise."""
    plans = _plans(module, query, key, attention_mask, options)
    if plans is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    with torch.autocast("cpu", enabled=False):
        scaling = options.get("scaling")
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        return attention(query.to(dtype), key.to(dtype), value.to(dtype), scale, plans), None


def _plans(
    module: Any, query: Tensor, key: Tensor, attention_mask: Any, options: dict[str, Any]
) -> list[BlockPlan] | None:
    """Return the plans of a batch, None if attention by blocks does not support the case."""
    T, is_causal = query.shape[2], options.get("is_causal")
    supported = (
        query.device.type == "cpu"
        and T == key.shape[2] > 1
        and not options.get("dropout")
        and not options.get("output_attentions")
        and all(options.get(name) is None for name in UNSUPPORTED)
    )
    if not supported:
        return None
    if attention_mask is None:
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        return [causal_plan(T, _wide(query), query.device)] if is_causal else None
    if not isinstance(attention_mask, Tensor) or attention_mask.shape[-2:] != (T, T):
        return None
    # All layers of a forward pass get the same mask: its plans are made once and stay with it.
    if not hasattr(attention_mask, "block_plans"):
        plans = plans_of_mask(attention_mask, _wide(query))
        attention_mask.block_plans = plans  # type: ignore[attr-defined]
    return attention_mask.block_plans  # type: ignore[attr-defined]
