"""The parts of a training step on a CPU that are no matrix products, each in one pass over
memory, by elementwise.c. torch computes the same in three to eight passes.

    gates       h = g σ(g) · u              dg = dh · u σ(g) (1 + g (1 - σ(g)))     du = dh · g σ(g)
    norms       y = w · x r                 dx = r (w dy - x r² mean(w dy x))
                r = 1 / sqrt(mean x² + ε)
    rotations   y₁ = x₁ c₁ - x₂ s₁          dx₁ = dy₁ c₁ + dy₂ s₂
                y₂ = x₂ c₂ + x₁ s₂          dx₂ = dy₂ c₂ - dy₁ s₁
    losses      L = log Σ exp z - z_target  dz = weight · (softmax(z) - 1_target)

Tensors are in bf16 or fp32, and computed in fp32. Rows are shared among torch's threads, and give
the same bits for any number of them. Each function needs what `supports` says of its tensors.
trainer.speed.fused and trainer.models.losses use them where trainer.speed.elementwise_choice
measured that they are faster.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapters import native

KINDS = ("gates", "norms", "rotations", "losses")
DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
SHARE = 1 << 16  # numbers of a thread, at least: less is done before a thread has started
# Arguments of the functions in elementwise.c: pointer, integer (64 bits) or float.
_ARGUMENTS = {
    "gated": "pppi",
    "gated_back": "pppppi",
    "norm": "ppppiif",
    "norm_back": "pppppii",
    "rotated": "ppppiipi",
    "entropy": "ppppppiiip",
}
_TYPES: dict[str, Any] = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return elementwise.c, compiled for this machine, or None if no compiler here compiles it."""
    loaded = native.library(Path(__file__).with_suffix(".c"))
    if loaded is None:
        return None
    for name, kinds in _ARGUMENTS.items():
        for dtype in DTYPES.values():
            function = getattr(loaded, f"{name}_{dtype}")
            function.argtypes, function.restype = [_TYPES[kind] for kind in kinds], None
    return loaded


def supports(*tensors: Tensor) -> bool:
    """Return whether these tensors can be computed here: plain ones of one dtype on a CPU."""
    first = tensors[0]
    return first.dtype in DTYPES and all(
        type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.dtype == first.dtype
        for x in tensors
    )


def _function(name: str, dtype: torch.dtype) -> Any:
    return getattr(library(), f"{name}_{DTYPES[dtype]}")


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def shared(call: Callable[[int, int], None], rows: int, width: int, least: int = SHARE) -> None:
    """Call call(start, end) for shares of the rows, of `least` numbers at least. ctypes releases
    the GIL, so that they run in parallel."""
    threads = min(torch.get_num_threads(), max(1, rows * width // least))
    if threads == 1:
        call(0, rows)
        return
    share = -(-rows // threads)
    pool = _pool(os.getpid(), torch.get_num_threads())  # a forked process has no threads
    parts = [pool.submit(call, start, min(start + share, rows)) for start in range(0, rows, share)]
    for part in parts:
        part.result()


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) · up, of any equal shape."""
    gate, up = gate.contiguous(), up.contiguous()
    out, call, size = torch.empty_like(gate), _function("gated", gate.dtype), gate.element_size()
    pointers = [x.data_ptr() for x in (gate, up, out)]
    shared(lambda a, b: call(*(p + a * size for p in pointers), b - a), gate.numel(), 1)
    return out


def gated_back(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up, from that of `gated`."""
    dh, gate, up = dh.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    call, size = _function("gated_back", gate.dtype), gate.element_size()
    pointers = [x.data_ptr() for x in (dh, gate, up, dgate, dup)]
    shared(lambda a, b: call(*(p + a * size for p in pointers), b - a), gate.numel(), 1)
    return dgate, dup


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (y, r) of x (..., d) and weight (d,); r (...,) is in fp32."""
    x, weight = x.contiguous(), weight.contiguous()
    d = x.shape[-1]
    y, r = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    call, size = _function("norm", x.dtype), x.element_size() * d

    def part(a: int, b: int) -> None:
        places = x.data_ptr() + a * size, weight.data_ptr(), y.data_ptr() + a * size
        call(*places, r.data_ptr() + 4 * a, b - a, d, eps)

    shared(part, r.numel(), d)
    return y, r


def norm_back(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> Tensor:
    """Return the gradient of x, from that of y and what `norm` was called with and returned."""
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    dx, d = torch.empty_like(x), x.shape[-1]
    call, size = _function("norm_back", x.dtype), x.element_size() * d

    def part(a: int, b: int) -> None:
        places = dy.data_ptr() + a * size, x.data_ptr() + a * size, weight.data_ptr()
        call(*places, r.data_ptr() + 4 * a, dx.data_ptr() + a * size, b - a, d)

    shared(part, r.numel(), d)
    return dx


def rotated(x: Tensor, cosine: Tensor, sine: Tensor, back: bool) -> Tensor:
    """Return x (B, H, T, d) rotated, or with `back` the gradient of x from that of the result.
    cosine and sine are (1 or B, T, d). The result is contiguous as (B, T, H, d)."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    cosine, sine = cosine.contiguous(), sine.contiguous()
    B, H, T, d = x.shape
    out = x.new_empty(B, T, H, d)
    step = 0 if len(cosine) == 1 else T * d
    shape = (ctypes.c_int64 * 7)(H, T, d, *x.stride()[:3], step)
    call = _function("rotated", x.dtype)
    pointers = [tensor.data_ptr() for tensor in (x, cosine, sine, out)]
    shared(lambda a, b: call(*pointers, a, b, ctypes.addressof(shape), int(back)), B * T, H * d)
    return out.transpose(1, 2)


def entropy(
    logits: Tensor, targets: Tensor, weights: Tensor | None, top: int, slopes: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (losses, ranks, slopes) of logits (n, V) and targets (n,) within 0 to V - 1.

    Losses (n,) are in fp32, without weights. A rank (n,) is how many logits come before the
    target's: larger ones, and equal ones of smaller index. With `top` of 1 it is 0 or not. Slopes
    (n, V) are the gradients of weight · loss at the logits, in their dtype, None if not asked for.
    """
    logits, targets = logits.contiguous(), targets.long().contiguous()
    n, V = logits.shape
    wide = None if weights is None else weights.float().contiguous()
    losses = logits.new_empty(n, dtype=torch.float32)
    ranks = logits.new_empty(n, dtype=torch.int64)
    slope = torch.empty_like(logits) if slopes else None
    call, size = _function("entropy", logits.dtype), logits.element_size() * V

    def part(a: int, b: int) -> None:
        scratch = logits.new_empty(V, dtype=torch.float32)
        call(
            logits.data_ptr() + a * size,
            targets.data_ptr() + 8 * a,
            None if wide is None else wide.data_ptr() + 4 * a,
            losses.data_ptr() + 4 * a,
            ranks.data_ptr() + 8 * a,
            None if slope is None else slope.data_ptr() + a * size,
            b - a,
            V,
            top,
            scratch.data_ptr(),
        )

    shared(part, n, V)
    return losses, ranks, slope
