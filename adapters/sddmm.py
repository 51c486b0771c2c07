"""The gradient of a weight at a few of its entries: sampled dense-dense matrix multiplication.

    g_j = Σ_t dy[t, row_j] x[t, col_j]        j = 1 … k

    dy  (t, o)  gradient of the layer's output        x  (t, i)  the layer's input        k ≪ o i

There are three implementations:

    native     k dot products of length t, in fp32, by sddmm.c. Needs a C compiler.
    sampled    the same dot products by torch. It takes two to five times as long as `native`; half
               of this is transposing dy and x in memory.
    gathered   dense products, some rows of the weight at a time, of which the k entries are kept.

`native` is faster than both up to a tenth of the entries or more, so `fastest` takes it where it is
available, without measuring: two runs of one command should use the same code. Which of the other
two is faster depends on the density and on the hardware, so `fastest` measures them. On CPU cores
without matrix units `sampled` costs a tenth to a fifth of the dense product at 0.5 % density, with
them a third.
"""

from __future__ import annotations

import ctypes
import functools
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adapters import native as native_code

WAYS = ("native", "sampled", "gathered")
CHUNK = 1 << 24  # entries of the dense gradient that are computed at one time
# tokens at a time: their fp32 copies fit into a CPU core's cache, which is twice as fast as all
TOKENS = 256


def sampled(
    dy: Float[Tensor, "t o"],
    x: Float[Tensor, "t i"],
    crow: Int[Tensor, " o1"],
    col: Int[Tensor, " k"],
) -> Float[Tensor, " k"]:
    """Return g in fp32 (float64 for float64 inputs), by torch.sparse.sampled_addmm. crow and col
    are the support in CSR."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not len(x):
        return torch.zeros(len(col), dtype=wide, device=x.device)
    with warnings.catch_warnings():
        # torch warns once per process that CSR tensors are in beta state
        warnings.filterwarnings("ignore", message="Sparse (CSR tensor|invariant).*")
        zeros = torch.zeros(len(col), dtype=wide, device=x.device)
        sums = torch.sparse_csr_tensor(
            crow, col, zeros, (dy.shape[1], x.shape[1]), check_invariants=False
        )
        step = TOKENS if x.device.type == "cpu" else len(x)
        for start in range(0, len(x), step):
            # Transpose before widening: the dot products run along the tokens.
            left = dy[start : start + step].t().contiguous().to(wide)
            right = x[start : start + step].t().contiguous().to(wide).t()
            sums = torch.sparse.sampled_addmm(sums, left, right)
        return sums.values()


NATIVE = {torch.bfloat16: "sampled_bf16", torch.float32: "sampled_fp32"}  # sddmm.c's functions
NATIVE_SHARE = 0.1  # the largest share of a weight's entries for which `fastest` takes `native`
WORDS = 128  # of sddmm.c: 4-byte words of a column in a tile


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return sddmm.c, compiled for this machine, or None if no compiler here compiles it."""
    loaded = native_code.library(Path(__file__).with_suffix(".c"))
    if loaded is None:
        return None
    for name in NATIVE.values():
        getattr(loaded, name).argtypes = (
            [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
        )
        getattr(loaded, name).restype = None
    return loaded


def native(
    dy: Float[Tensor, "t o"],
    x: Float[Tensor, "t i"],
    crow: Int[Tensor, " o1"],
    col: Int[Tensor, " k"],
) -> Float[Tensor, " k"]:
    """Return g in fp32, by sddmm.c, for CPU tensors in bf16 or fp32. crow and col are the support
    in CSR, in int32."""
    dy, x = dy.contiguous(), x.contiguous()
    (t, o), i = dy.shape, x.shape[1]
    call = getattr(library(), NATIVE[x.dtype])
    tile = 2 * WORDS if x.dtype == torch.bfloat16 else WORDS
    share = -(-t // (tile * torch.get_num_threads())) * tile  # tokens per thread

    def part(start: int) -> Tensor:
        out, scratch = torch.zeros(len(col)), torch.empty((o + i) * WORDS, dtype=torch.int32)
        left, right = dy[start : start + share], x[start : start + share]
        pointers = [tensor.data_ptr() for tensor in (left, right, crow, col, out)]
        call(*pointers, len(left), o, i, scratch.data_ptr())
        return out

    if t <= share:
        return part(0) if t else torch.zeros(len(col))
    # ctypes releases the GIL, so the threads run in parallel
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return torch.stack(list(pool.map(part, range(0, t, share)))).sum(0)


def gathered(
    dy: Float[Tensor, "t o"], x: Float[Tensor, "t i"], flat: Int[Tensor, " k"], chunk: int = CHUNK
) -> Float[Tensor, " k"]:
    """Return g in the inputs' dtype, from at most `chunk` entries of the dense gradient at a time.
    `flat` is the support as sorted row · i + col."""
    (o, i), rows = (dy.shape[1], x.shape[1]), max(1, chunk // x.shape[1])
    if rows >= o:
        return (dy.t() @ x).view(-1).index_select(0, flat)
    starts = range(0, o, rows)
    ends = torch.tensor([min(start + rows, o) * i for start in starts], device=flat.device)
    bounds = [0, *torch.searchsorted(flat, ends.to(flat.dtype)).tolist()]
    parts = []
    for start, low, high in zip(starts, bounds, bounds[1:], strict=False):
        if high > low:
            part = dy[:, start : start + rows].t() @ x
            parts.append(part.view(-1).index_select(0, flat[low:high] - start * i))
    return torch.cat(parts)


def native_available(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether `native` is available for such tensors on this machine."""
    return device.type == "cpu" and dtype in NATIVE and library() is not None


@functools.cache
def fastest(
    o: int, i: int, k: int, dtype: torch.dtype, device: torch.device, tokens: int = 1024
) -> str:
    """Return the implementation for such a layer: native if it is available and k is small, else
    the faster of the others, measured on random numbers."""
    if native_available(dtype, device) and k <= NATIVE_SHARE * o * i:
        return "native"
    draw = torch.Generator().manual_seed(0)
    flat = (torch.arange(k, dtype=torch.float64) * (o * i / k)).long()
    crow = torch.searchsorted(flat // i, torch.arange(o + 1)).int().to(device)
    col, flat = (flat % i).int().to(device), flat.int().to(device)
    dy = torch.randn(tokens, o, generator=draw).to(device, dtype)
    x = torch.randn(tokens, i, generator=draw).to(device, dtype)
    times = {
        "sampled": _time(lambda: sampled(dy, x, crow, col), device),
        "gathered": _time(lambda: gathered(dy, x, flat), device),
    }
    return min(times, key=times.__getitem__)


def _time(call: object, device: torch.device) -> float:
    least = float("inf")
    for _ in range(4):  # the first warms up, and is never the fastest
        started = time.perf_counter()
        call()  # type: ignore[operator]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        least = min(least, time.perf_counter() - started)
    return least
