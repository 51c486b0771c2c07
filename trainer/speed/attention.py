"""Attention on a CPU, by blocks of queries or by torch's flash kernel.

    blocks    against the keys that any query of a block sees, as batched products; scores and
              softmax in fp32. The backward pass is faster than torch's for short rows: it was 18 %
              of a LoRA step in bf16.
    flash     torch's kernel of sdpa (trainer.speed.flash_pieces), which is faster for long rows,
              and in its forward pass on processors with matrix units.

Which of them is faster depends on processor, length and mask; trainer.speed.attention_choice
measures it. Results are those of sdpa up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trainer.speed import flash_pieces
from trainer.speed.flash_pieces import Piece

BLOCKED = "blocked"  # the attention's name in transformers
# Queries whose scores exist at one time: few enough that the scores stay in a core's cache.
BLOCK = 64
UNSUPPORTED = ("position_bias", "cache", "softcap", "s_aux")  # options of transformers' attention
BLOCKS, FLASH = "blocks", "flash"  # the kernels
# For each block of queries: (first query, last query + 1, first key, last key + 1, mask). The keys
# are those that some query of the block sees; the mask is added to the scores.
BlockPlan = list[tuple[int, int, int, int, Tensor | None]]


def register() -> None:
    """Make this attention known to transformers, under the name BLOCKED."""
    if BLOCKED not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(BLOCKED, blocked_attention_forward)
        ALL_MASK_ATTENTION_FUNCTIONS.register(BLOCKED, sdpa_mask)


class _Blocks(torch.autograd.Function):
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
        ctx.save_for_backward(q, k, v)
        ctx.scale, ctx.plans = scale, plans
        return _blocks_forward(q, k, v, scale, plans)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        return *_blocks_backward(q, k, v, dout, ctx.scale, ctx.plans), None, None


def _blocks_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, plans: list[BlockPlan]
) -> Float[Tensor, "B T H e"]:
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
    return out.view(B, T, H, e)


def _blocks_backward(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, scale: float, plans: list[BlockPlan]
) -> tuple[Tensor, Tensor, Tensor]:
    (B, H, T, d), K, e = q.shape, k.shape[1], v.shape[-1]
    G = H // K
    dq = q.new_empty(B, K, G, T, d)
    # dk and dv are sums over the blocks, so they are wide.
    dk, dv = q.new_zeros(B, K, T, d, dtype=_wide(q)), q.new_zeros(B, K, T, e, dtype=_wide(q))
    dout = dout.to(q.dtype).reshape(B, T, K, G, e)
    with torch.autocast(q.device.type, enabled=False):
        for rows, plan in _rows_by_plan(plans, B):
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
    return dq.view(B, H, T, d), dk.mul_(scale).to(k.dtype), dv.to(v.dtype)


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


class _Flash(torch.autograd.Function):
    """Softmax attention whose forward pass is torch's flash kernel, and whose backward pass is
    that, too, or _Blocks'. Only what the backward pass reads is saved."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, plans: Plans, backward: str
    ) -> Tensor:
        out, sums = flash_pieces.forward(q, k, v, scale, plans.pieces)
        ctx.scale, ctx.plans, ctx.backward_kernel = scale, plans, backward
        ctx.save_for_backward(q, k, v, *((out, *sums) if backward == FLASH else ()))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, *more = ctx.saved_tensors
        if ctx.backward_kernel == FLASH:
            grads = flash_pieces.backward(
                q, k, v, more[0], more[1:], dout, ctx.scale, ctx.plans.pieces
            )
        else:
            grads = _blocks_backward(q, k, v, dout, ctx.scale, ctx.plans.blocks)
        return *grads, None, None, None


class Plans:
    """The keys that the queries of a batch see, as blocks and as pieces."""

    def __init__(self, blocks: list[BlockPlan], pieces: list[list[Piece]] | None):
        self.blocks = blocks
        self.pieces = pieces or []
        self.flash = pieces is not None  # whether the flash kernel supports the case


def attention(
    q: Float[Tensor, "B H T d"],
    k: Float[Tensor, "B K T d"],
    v: Float[Tensor, "B K T e"],
    scale: float,
    plans: Plans,
    kernels: tuple[str, str] = (BLOCKS, BLOCKS),
) -> Float[Tensor, "B T H e"]:
    """Compute attention with the kernels of the forward and the backward pass. After blocks, the
    backward pass is by blocks, too. The plans are one for all rows, or one for each."""
    if kernels[0] == BLOCKS:
        return _Blocks.apply(q, k, v, scale, plans.blocks)
    return _Flash.apply(q, k, v, scale, plans, kernels[1])


def blocked_attention_forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Compute what transformers calls attention "blocked": by the kernels of this file where they
    support the case, by transformers' sdpa otherwise. `module.attention_choice`, if it is there,
    says which kernels; else blocks."""
    plans = _plans(module, query, key, attention_mask, options)
    if plans is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    choice, kernels = getattr(module, "attention_choice", None), (BLOCKS, BLOCKS)
    if choice is not None and plans.flash and query.shape[-1] == value.shape[-1]:
        kernels = choice.kernels(plans, dtype)
    with torch.autocast("cpu", enabled=False):
        scaling = options.get("scaling")
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
        return attention(q, k, v, scale, plans, kernels), None


def causal(T: int, dtype: torch.dtype, device: torch.device) -> Plans:
    """Return the plans for queries that see themselves and what is before them."""
    return Plans([causal_plan(T, dtype, device)], [[Piece(0, T, 0, T, True, None)]])


def of_mask(mask: Tensor, dtype: torch.dtype, flash: bool) -> Plans | None:
    """Return the plans for a mask (B | 1, 1 | H, T, T), as plans_of_mask does; those of the flash
    kernel only with `flash`."""
    blocks = plans_of_mask(mask, dtype)
    if blocks is None:
        return None
    return Plans(blocks, flash_pieces.of_mask(mask) if flash else None)


def _plans(
    module: Any, query: Tensor, key: Tensor, attention_mask: Any, keywords: dict[str, Any]
) -> Plans | None:
    """Return the plans of a batch, None if this file does not support the case."""
    T, is_causal = query.shape[2], keywords.get("is_causal")
    supported = (
        query.device.type == "cpu"
        and T == key.shape[2] > 1
        and not keywords.get("dropout")
        and not keywords.get("output_attentions")
        and all(keywords.get(name) is None for name in UNSUPPORTED)
    )
    if not supported:
        return None
    if attention_mask is None:
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        return causal(T, _wide(query), query.device) if is_causal else None
    if not isinstance(attention_mask, Tensor) or attention_mask.shape[-2:] != (T, T):
        return None
    # All layers of a forward pass get the same mask: its plans are made once and stay with it.
    if not hasattr(attention_mask, "attention_plans"):
        flash = getattr(module, "attention_choice", None) is not None
        plans = of_mask(attention_mask, _wide(query), flash)
        attention_mask.attention_plans = plans  # type: ignore[attr-defined]
    return attention_mask.attention_plans  # type: ignore[attr-defined]
